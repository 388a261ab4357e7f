"""What the processes of a launch send each other, predicted: bytes as the code hands them to its collectives, and their time.

Per process, tests count the same in real launches:

    data     once per step an all-reduce of the adapter's float32 gradients and one number (`mesh.reduce_gradients`)
    context  per block and pass one all-to-all of q, k and v of the own tokens, and one of the attention's output for them with
             all of the text (`context.ContextRanks`). A step passes forward, backward, and forward again through every block
             that does not keep all. At the end the velocity's parts are gathered
    shard    the stored bytes of every block, gathered in the forward and again in the backward pass (`shards`), whatever is
             recomputed in between. Two blocks lie there when a pass begins, and are spared

Of b bytes and n ranks a link carries (n - 1) / n of b in an all-to-all and in an all-gather (b is the whole), twice that in an
all-reduce (NVIDIA/nccl-tests, doc/PERFORMANCE.md). What hides: all-reduce and all-to-all stand in the way of everything, on the
stream that computes; a gather runs beside the block before it (`pace` shows a part). In-network reduction is not counted on.
Not here, because they are a few bytes: the question whether to stop, the step cache's mean.
"""

from dataclasses import dataclass
from math import gcd

from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import compute_dtype
from mochi_lora.planning.cards import Card
from mochi_lora.planning.footprint import runs_of, split_bytes
from mochi_lora.planning.workload import Workload

# Units (a bf16 vector of the visual width per token) that one block's two exchanges read and write beside the link, counted in
# the code: q, k and v are stacked, put in order for the ranks, and put in order again; the output twice.
_REARRANGED = 22
# Seconds that a collective takes beside its bytes, waiting for the other ranks included: what is left of 288 exchanges a step
# of two H200, 0.1 s at 85 frames and at 163 (benchmarks/results/scale.jsonl). More ranks may take longer.
_CALL = 370e-6
_PLACES = 2  # sharded blocks that lie there whole


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process hands to its collectives; of a gather, the whole that it gets."""

    exchanged: float = 0.0
    collected: float = 0.0  # velocity
    gathered: float = 0.0  # weights
    reduced: float = 0.0

    @property
    def sum(self) -> float:
        """All of them."""
        return self.exchanged + self.collected + self.gathered + self.reduced


def step_traffic(plan: Plan, work: Workload) -> Traffic:
    """Of one optimiser step, all micro-steps."""
    assert work.adapter, "a step trains an adapter"
    times = work.micro_steps
    return Traffic(
        exchanged=times * (2 + repeated(plan, work)) * _exchanged(plan, work),
        collected=times * _velocity(plan, work),
        gathered=2 * times * gathered_one_way(plan, work),
        reduced=_reduced(work),
    )


def pass_traffic(plan: Plan, work: Workload) -> Traffic:
    """Of one pass without gradients, of many: each leaves the first blocks there for the next."""
    gathered = 0.0
    if plan.shard > 1:
        blocks = split_bytes(work.model, plan.precision)
        turns = (blocks[place::_PLACES] for place in range(_PLACES))
        gathered = sum(sum(turn) for turn in turns if len(turn) > 1)
    return Traffic(_exchanged(plan, work), _velocity(plan, work), gathered)


def repeated(plan: Plan, work: Workload) -> float:
    """Share of the blocks whose exchanges the backward pass repeats: but for those that keep all, none is kept."""
    layers = work.model.layers
    return sum(blocks for mode, blocks in runs_of(plan.checkpointing, layers) if mode != "none") / layers


def gathered_one_way(plan: Plan, work: Workload) -> float:
    """Bytes of the blocks gathered in the forward pass of a training step, and in its backward: their mean."""
    if plan.shard == 1:
        return 0.0
    blocks = split_bytes(work.model, plan.precision)
    return (sum(blocks[_PLACES:]) + sum(blocks[:-_PLACES])) / 2


def exchange_seconds(plan: Plan, work: Workload, card: Card) -> float:
    """All blocks' exchanges in one direction; with what putting tokens in order takes."""
    if work.context == 1:
        return 0.0
    near = _near(work.context, work.processes)
    share = _exchanged(plan, work) / work.context  # for each rank of the group
    link = max(share * (near - 1) / card.link, share * (work.context - near) / card.network) / 1e9
    moved = _REARRANGED * 2 * work.model.width * work.tokens * work.model.layers
    return link + moved / (card.bandwidth * 1e9) + 2 * work.model.layers * _CALL


def velocity_seconds(plan: Plan, work: Workload, card: Card) -> float:
    """Putting the parts of the velocity together."""
    if work.context == 1:
        return 0.0
    return _ring(_velocity(plan, work), work.context, work.processes, card) + _CALL


def gather_seconds(gathered: float, plan: Plan, work: Workload, card: Card) -> float:
    """`gathered` bytes of whole blocks; a block's call waits for nobody but the block that needs it."""
    if plan.shard == 1:
        return 0.0
    return _ring(gathered, plan.shard, work.processes, card)


def reduce_seconds(work: Workload, card: Card) -> float:
    """The gradients of a step: over the links, and read and written twice on the way into one tensor and out of it."""
    if work.world == 1:
        return 0.0
    reduced = _reduced(work)
    return 2 * _ring(reduced, work.world, work.processes, card) + 4 * reduced / (card.bandwidth * 1e9) + _CALL


def _exchanged(plan: Plan, work: Workload) -> float:
    """One pass through all blocks: three vectors and one of each own token, one of each token of the text."""
    if work.context == 1:
        return 0.0
    vectors = 4 * work.tokens + work.batch * work.text_tokens
    return work.model.layers * vectors * work.model.width * compute_dtype(plan.precision).itemsize


def _velocity(plan: Plan, work: Workload) -> float:
    whole = work.batch * work.bucket.tokens * work.model.patch * compute_dtype(plan.precision).itemsize
    return whole if work.context > 1 else 0.0


def _reduced(work: Workload) -> float:
    return 4.0 * (work.adapter.parameters + 1) if work.adapter and work.world > 1 else 0.0


def _near(group: int, here: int) -> int:
    """Ranks of a group of neighbours that are sure to be on one host, of which each has `here`."""
    return group if here % group == 0 else gcd(group, here)


def _ring(whole: float, ranks: int, here: int, card: Card) -> float:
    """(n - 1) / n of the bytes; between hosts a ring per network port carries a part each, so all ports work for all."""
    near = _near(ranks, here)
    rate = card.link if near == ranks else min(card.link, card.network * near)
    return whole * (ranks - 1) / ranks / (rate * 1e9)

"""How long a plan takes, predicted: products and attention by the card's rates, the rest by bytes moved.

Of the frozen base a step needs the forward pass, the input gradients (as many operations as the forward pass), and what
checkpointing recomputes. Attention's backward is 2.5 times its forward (q k^T again, and four gradients' products).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mochi_lora.config.engine import Mode
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import compute_dtype
from mochi_lora.planning.cards import Card
from mochi_lora.planning.footprint import (
    Constants,
    fitted,
    kept_bytes,
    offloading_blocks,
    runs_of,
    score_bytes,
    weight_bytes,
)
from mochi_lora.planning.traffic import (
    exchange_seconds,
    gather_seconds,
    gathered_one_way,
    pass_traffic,
    reduce_seconds,
    repeated,
    velocity_seconds,
)
from mochi_lora.planning.workload import Workload
from mochi_lora.spec import Bucket

_DECODED = 5.0  # bytes per parameter and pass: int8 or nf4 read, bf16 written and read again
_TRANSPOSED = 3.0  # bytes per parameter of fp8 weights in the backward pass: read, written and read again
# Operations that a pixel of a decoded video counts as: 1.941 s for 163x480x848 at an H200's rate of bf16 products, by our VAE
# in bf16 (benchmarks/results/encode.jsonl; its 0.448 s for 37 frames come out 2 % short).
_DECODED_PIXEL = 1.941 * 750e12 / (163 * 480 * 848)
# Of a transfer's time, what shows although there is work to hide it behind: of copies from the host a guess, of gathers between
# GPUs what two H200 lost at 37 frames (54 ms a step of 2 x 27 ms, 43 a guided step): NCCL takes multiprocessors and bandwidth.
_SEEN, _GATHER_SEEN = 0.1, 0.9
_SCORES_MOVED = (10, 18)  # copies of the scores that the kernel called math reads and writes, forward and backward
_EMULATED = 0.4  # of the bf16 rate: products of a precision that the card has no kernel for


@dataclass(frozen=True)
class _Pass:
    """Seconds of all blocks together, by kind of work."""

    products: float
    attention: float
    moved: float

    @property
    def seconds(self) -> float:
        return self.products + self.attention + self.moved


def seconds_per_step(plan: Plan, work: Workload, card: Card, constants: Constants | None = None) -> float:
    """One optimiser step of one process, all micro-steps.

    What crosses the bus is hidden as far as there is work to hide it, and so are sharded weights on their way between GPUs;
    nothing hides what else ranks send each other (`traffic`).
    """
    assert work.adapter, "a step trains an adapter"
    known = constants or fitted()
    forward, backward = _forward(plan, work, card, known), _backward(plan, work, card, known)
    again = _recomputed(plan, work, card, known)
    exchange = exchange_seconds(plan, work, card)
    swap = _fetch_seconds(plan, work, card, gathered_one_way(plan, work))
    kept = offloading_blocks(plan, work) * kept_bytes("offload", plan, work, known) / (card.host * 1e9)
    there = forward.seconds + exchange + velocity_seconds(plan, work, card)
    shown = _seen(plan) * swap + _SEEN * kept
    out = max(there, swap, kept) + shown  # to the host and from it are two lanes
    back = max(backward.seconds + again + (1 + repeated(plan, work)) * exchange, swap + kept) + shown
    return work.micro_steps * (out + back) + reduce_seconds(work, card) + known.fixed_seconds


def mean_seconds(plan: Plan, work: Workload, buckets: Sequence[Bucket], card: Card) -> float:
    """`seconds_per_step` over clips of these shapes, each as often as it is there."""
    by_shape = {bucket: seconds_per_step(plan, replace(work, bucket=bucket), card) for bucket in set(buckets)}
    return sum(by_shape[bucket] for bucket in buckets) / len(buckets)


def seconds_per_pass(plan: Plan, work: Workload, card: Card, constants: Constants | None = None) -> float:
    """One pass without gradients over a batch of `work.bucket`."""
    known = constants or fitted()
    swap = _fetch_seconds(plan, work, card, pass_traffic(plan, work).gathered)
    there = _forward(plan, work, card, known).seconds
    there += exchange_seconds(plan, work, card) + velocity_seconds(plan, work, card)
    return max(there, swap) + _seen(plan) * swap


def seconds_per_guided_step(plan: Plan, work: Workload, card: Card, constants: Constants | None = None) -> float:
    """One denoising step of one video of `work.bucket` under both prompts, in the passes that `plan` says."""
    together = 2 if plan.guidance_passes == "one" else 1
    return 2 / together * seconds_per_pass(plan, replace(work, batch=together), card, constants)


def decoding_seconds(bucket: Bucket, card: Card) -> float:
    """The VAE on one video, in chunks of time: by its pixels and the card's rate of products, as measured on an H200."""
    pixels = bucket.frames * bucket.height * bucket.width
    return _DECODED_PIXEL * pixels / (card.products["bf16"] * 1e12)


def _fetch_seconds(plan: Plan, work: Workload, card: Card, gathered: float) -> float:
    """All swapped blocks fetched once from the host, or `gathered` bytes of blocks from the ranks that share them."""
    if plan.shard > 1:
        return gather_seconds(gathered, plan, work, card)
    return plan.block_swap / work.model.layers * weight_bytes(work.model, plan.precision) / (card.host * 1e9)


def _seen(plan: Plan) -> float:
    """Of the time that `_fetch_seconds` says, what shows."""
    return _GATHER_SEEN if plan.shard > 1 else _SEEN


def _forward(plan: Plan, work: Workload, card: Card, known: Constants) -> _Pass:
    return _Pass(
        _products(plan, work, card, backward=False),
        _attention(plan, work, card, backward=False),
        _moved(plan, work, card, known, (known.moved_compiled if plan.compile else known.moved_eager) / 3),
    )


def _backward(plan: Plan, work: Workload, card: Card, known: Constants) -> _Pass:
    return _Pass(
        _products(plan, work, card, backward=True),
        _attention(plan, work, card, backward=True),
        _moved(plan, work, card, known, (known.moved_compiled if plan.compile else known.moved_eager) * 2 / 3),
    )


def _recomputed(plan: Plan, work: Workload, card: Card, known: Constants) -> float:
    """Seconds of doing again in the backward pass what was not kept."""
    forward = _forward(plan, work, card, known)
    moved = _moved(plan, work, card, known, known.again_compiled if plan.compile else known.again_eager)
    width = work.model.width
    wide = 2 * width * int(8 * width / 3) / work.model.visual  # the MLP's first matrix, of all products
    shares: dict[Mode, tuple[float, float, float]] = {  # of products, attention, element-wise work
        "none": (0, 0, 0),
        "mlp_recomputed": (wide, 0, 0.6),
        "attention_saved": (1, 0, 1),
        "offload": (1, 0, 1),
        "full": (1, 1, 1),
    }
    seconds = 0.0
    for mode, blocks in runs_of(plan.checkpointing, work.model.layers):
        products, attention, elementwise = shares[mode]
        whole = products * forward.products + attention * forward.attention + elementwise * moved
        seconds += blocks / work.model.layers * whole
    return seconds


def _products(plan: Plan, work: Workload, card: Card, *, backward: bool) -> float:
    """All linears of all blocks once. Text and modulation are so few rows that reading their weights takes the time."""
    model = work.model
    parameters = model.layers * model.visual
    operations = 2 * parameters * work.tokens / 1e12
    bf16 = card.products["bf16"]
    few_rows = model.layers * (model.text + model.modulation) * 2 / (card.bandwidth * 1e9)
    match plan.precision:
        case "fp8":
            seconds = operations / card.products.get("fp8", _EMULATED * bf16)
            seconds += backward * _TRANSPOSED * parameters / (card.bandwidth * 1e9)
        case "int8" | "nf4":
            seconds = operations / bf16 + _DECODED * parameters / (card.bandwidth * 1e9)
        case "fp32":
            seconds = operations / (bf16 / 2)  # TF32 at best
        case _:
            seconds = operations / bf16
    return seconds + few_rows


def _attention(plan: Plan, work: Workload, card: Card, *, backward: bool) -> float:
    """All blocks' attention in one direction; in float32 at half the rate, as every product here."""
    operations = _attention_operations(work) * (2.5 if backward else 1.0)
    if plan.attention == "math":
        copies = _SCORES_MOVED[backward] * work.model.layers * score_bytes(work, work.bucket.tokens, work.batch)
        return operations / (card.products["bf16"] / 2 * 1e12) + copies / (card.bandwidth * 1e9)
    rate = card.attention_rates(plan.attention, work.bucket.tokens)[backward]
    return operations / (rate * (0.5 if plan.precision == "fp32" else 1.0) * 1e12)


def _attention_operations(work: Workload) -> float:
    """Forward, all blocks: two products of S x S x width, two operations each; context ranks have a part of the heads."""
    length = work.bucket.tokens + work.text_tokens
    return work.batch * work.model.layers * 4.0 * length**2 * work.model.width / work.context


def _moved(plan: Plan, work: Workload, card: Card, known: Constants, units: float) -> float:
    if plan.precision == "fp8":
        units += known.quantising
    length = work.tokens + work.batch * work.text_tokens / 2
    return (
        units * compute_dtype(plan.precision).itemsize * work.model.width * length * work.model.layers / (card.bandwidth * 1e9)
    )

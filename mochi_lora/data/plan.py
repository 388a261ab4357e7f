"""Which sample stands at which position: the batch plan, a pure function of (items, seed, epoch, samples per step).

A *position* counts samples since the start of training. Optimiser step s covers positions s*n .. s*n + n - 1, where n =
samples per step = per-GPU batch x accumulation x ranks. All of a step's samples share one bucket, so every rank and
micro-step works on one shape. How n is cut into ranks and micro-steps changes nothing: accumulation 2 x 1 is batch 2, and
two processes are one with twice the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from mochi_lora.spec import Bucket
from mochi_lora.streams import Purpose, stream


def plan_epoch(buckets: Sequence[Bucket], seed: int, epoch: int, samples_per_step: int) -> list[tuple[int, ...]]:
    """Item indices of every step of one epoch; `buckets[i]` is the shape of item i.

    Every item comes at least once. A bucket's last step is filled with further draws from the same bucket (from the
    start of its shuffled order), so no clip is dropped and no step is short.
    """
    generator = stream(seed, Purpose.ORDER, epoch)
    steps: list[tuple[int, ...]] = []
    for bucket in sorted(set(buckets)):
        items = [index for index, shape in enumerate(buckets) if shape == bucket]
        order = [items[i] for i in generator.permutation(len(items))]
        for start in range(0, len(order), samples_per_step):
            chosen = order[start : start + samples_per_step]
            fill = samples_per_step - len(chosen)
            steps.append(tuple(chosen + [order[i % len(order)] for i in range(fill)]))
    return [steps[i] for i in generator.permutation(len(steps))]


@dataclass(frozen=True)
class BatchPlan:
    """The endless sequence of steps, one epoch after another."""

    buckets: tuple[Bucket, ...]
    seed: int
    samples_per_step: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every item came at least once; the same for every epoch."""
        return sum(-(-self.buckets.count(bucket) // self.samples_per_step) for bucket in set(self.buckets))

    def items(self, step: int) -> tuple[int, ...]:
        """Item indices of one step, by place in the step: place p is position step * samples_per_step + p."""
        epoch, row = divmod(step, self.steps_per_epoch)
        return _epoch(self.buckets, self.seed, epoch, self.samples_per_step)[row]


@lru_cache(maxsize=2)
def _epoch(buckets: tuple[Bucket, ...], seed: int, epoch: int, samples_per_step: int) -> list[tuple[int, ...]]:
    return plan_epoch(buckets, seed, epoch, samples_per_step)


@dataclass(frozen=True)
class Share:
    """How one rank cuts a step into micro-steps."""

    batch_size: int
    accumulation: int
    ranks: int = 1
    rank: int = 0

    @property
    def samples_per_step(self) -> int:
        """Samples that enter one optimiser step, over all ranks."""
        return self.batch_size * self.accumulation * self.ranks

    def places(self, micro_step: int) -> range:
        """Places within the step that this rank takes in `micro_step`."""
        start = (micro_step * self.ranks + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

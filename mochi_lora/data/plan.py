"""Which sample stands at which position: the batch plan, a pure function of (pools, seed, epoch, samples per step).

A *position* counts samples since the start of training. Optimiser step s covers positions s*n .. s*n + n - 1, where n =
samples per step = per-GPU batch x accumulation x data ranks. All of a step's samples share one bucket, so every rank and
micro-step works on one shape. How n is cut into ranks and micro-steps changes nothing: accumulation 2 x 1 is batch 2, and
two processes are one with twice the batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mochi_lora.spec import Bucket
from mochi_lora.streams import Purpose, stream


@dataclass(frozen=True)
class Pool:
    """Items of one shape that are drawn equally often, and how many draws of them an epoch has: one each at least."""

    bucket: Bucket
    items: tuple[int, ...]
    draws: int


def pools_of_shapes(buckets: Sequence[Bucket]) -> tuple[Pool, ...]:
    """Every item once per epoch; `buckets[i]` is the shape of item i."""
    pools = []
    for bucket in sorted(set(buckets)):
        items = tuple(index for index, shape in enumerate(buckets) if shape == bucket)
        pools.append(Pool(bucket, items, len(items)))
    return tuple(pools)


def plan_epoch(
    buckets: Sequence[Bucket], seed: int, epoch: int, samples_per_step: int, pools: Sequence[Pool] = ()
) -> list[tuple[int, ...]]:
    """Item indices of every step of one epoch; `buckets[i]` is the shape of item i, `pools` say how often each comes.

    Without pools every item comes once. A pool with d draws of n items takes each floor(d / n) times, and d mod n of them,
    others in each epoch, once more. A bucket's last step is filled with further draws from the same bucket (from the start
    of its shuffled order), so no clip is dropped and no step is short.
    """
    generator = stream(seed, Purpose.ORDER, epoch)
    pools = pools or pools_of_shapes(buckets)
    steps: list[tuple[int, ...]] = []
    for bucket in sorted({pool.bucket for pool in pools}):
        items = [item for pool in pools if pool.bucket == bucket for item in _drawn(pool, generator)]
        order = [items[i] for i in generator.permutation(len(items))]
        for start in range(0, len(order), samples_per_step):
            chosen = order[start : start + samples_per_step]
            fill = samples_per_step - len(chosen)
            steps.append(tuple(chosen + [order[i % len(order)] for i in range(fill)]))
    return [steps[i] for i in generator.permutation(len(steps))]


def _drawn(pool: Pool, generator: np.random.Generator) -> list[int]:
    times, more = divmod(pool.draws, len(pool.items))
    # Nothing is drawn for equal counts: the order of a plain data set is what it was before there were pools.
    again = [pool.items[i] for i in generator.permutation(len(pool.items))[:more]] if more else []
    return [*pool.items * times, *again]


@dataclass(frozen=True)
class BatchPlan:
    """The endless sequence of steps, one epoch after another."""

    buckets: tuple[Bucket, ...]
    seed: int
    samples_per_step: int
    pools: tuple[Pool, ...] = ()  # none: every item once per epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every item came as often as its pool says; the same for every epoch."""
        return _steps_per_epoch(self.buckets, self.pools, self.samples_per_step)

    def items(self, step: int) -> tuple[int, ...]:
        """Item indices of one step, by place in the step: place p is position step * samples_per_step + p."""
        epoch, row = divmod(step, self.steps_per_epoch)
        return _epoch(self.buckets, self.pools, self.seed, epoch, self.samples_per_step)[row]


@lru_cache(maxsize=2)
def _steps_per_epoch(buckets: tuple[Bucket, ...], pools: tuple[Pool, ...], samples_per_step: int) -> int:
    draws: Counter[Bucket] = Counter()
    for pool in pools or pools_of_shapes(buckets):
        draws[pool.bucket] += pool.draws
    return sum(-(-count // samples_per_step) for count in draws.values())


@lru_cache(maxsize=2)
def _epoch(
    buckets: tuple[Bucket, ...], pools: tuple[Pool, ...], seed: int, epoch: int, samples_per_step: int
) -> list[tuple[int, ...]]:
    return plan_epoch(buckets, seed, epoch, samples_per_step, pools)


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

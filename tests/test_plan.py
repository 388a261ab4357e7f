"""The batch plan: complete, of one shape per step, and a function of seed and epoch alone."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mochi_lora.data.plan import BatchPlan, Pool, Share, plan_epoch, pools_of_shapes
from mochi_lora.spec import Bucket

WIDE, TALL, STILL = Bucket(7, 32, 48), Bucket(7, 48, 32), Bucket(1, 32, 48)
SHAPES = (WIDE, TALL, WIDE, WIDE, STILL, TALL, WIDE, WIDE, WIDE, TALL, WIDE)  # 7 wide, 3 tall, 1 still
PLANS = [(seed, epoch, per_step) for seed in (0, 2**62) for epoch in (0, 1, 9) for per_step in (1, 2, 3, 4, 16)]


@pytest.mark.parametrize(("seed", "epoch", "per_step"), PLANS)
def test_every_item_comes_and_every_step_is_full_and_of_one_shape(seed, epoch, per_step):
    steps = plan_epoch(SHAPES, seed, epoch, per_step)
    assert {len(step) for step in steps} == {per_step}
    assert all(len({SHAPES[item] for item in step}) == 1 for step in steps)
    counts = Counter(item for step in steps for item in step)
    assert set(counts) == set(range(len(SHAPES)))
    assert len(steps) == BatchPlan(SHAPES, seed, per_step).steps_per_epoch
    for bucket in set(SHAPES):  # what fills a short step is spread: no item comes twice more than another
        of_bucket = [counts[item] for item, shape in enumerate(SHAPES) if shape == bucket]
        assert max(of_bucket) - min(of_bucket) <= 1


def test_without_a_short_step_every_item_comes_exactly_once():
    steps = plan_epoch([WIDE] * 12, seed=3, epoch=5, samples_per_step=4)
    assert sorted(item for step in steps for item in step) == list(range(12))


def test_a_plan_is_a_function_of_seed_and_epoch_and_not_of_history():
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    forwards = [plan_epoch(SHAPES, 4, epoch, 2) for epoch in range(4)]
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(2)
    assert [plan_epoch(SHAPES, 4, epoch, 2) for epoch in (3, 2, 1, 0)][::-1] == forwards


def test_a_batch_plan_is_its_epochs_one_after_the_other():
    plan = BatchPlan(SHAPES, seed=7, samples_per_step=3)
    epochs = [plan_epoch(SHAPES, 7, epoch, 3) for epoch in range(4)]
    assert [plan.items(step) for step in range(4 * plan.steps_per_epoch)] == [step for epoch in epochs for step in epoch]


def test_epochs_and_seeds_differ_in_order_and_in_what_stands_together():
    def epoch(seed, number):
        return plan_epoch([WIDE] * 16, seed, number, 2)

    plans = [epoch(seed, number) for seed in (0, 1) for number in (0, 1)]
    together = [frozenset(frozenset(step) for step in plan) for plan in plans]
    assert len(set(together)) == 4


def test_shapes_are_mixed_over_the_epoch():
    steps = plan_epoch([WIDE] * 20 + [TALL] * 20, seed=0, epoch=0, samples_per_step=1)
    order = [item < 20 for (item,) in steps]
    changes = sum(before != after for before, after in pairwise(order))
    assert changes > 10  # 1 if buckets followed one another, 20 on average when mixed


CUTS = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)]


@pytest.mark.parametrize(("batch", "accumulation", "ranks"), CUTS)
def test_ranks_and_micro_steps_cut_a_step_without_gap_or_overlap(batch, accumulation, ranks):
    shares = [Share(batch, accumulation, ranks, rank) for rank in range(ranks)]
    assert {share.samples_per_step for share in shares} == {8}
    places = [place for share in shares for micro in range(accumulation) for place in share.places(micro)]
    assert sorted(places) == list(range(8))
    assert all(len(share.places(micro)) == batch for share in shares for micro in range(accumulation))


def test_any_cut_of_a_step_trains_on_the_same_samples():
    plan = BatchPlan(SHAPES, seed=1, samples_per_step=8)
    for step in range(6):
        trained = {
            tuple(
                sorted(
                    plan.items(step)[place]
                    for rank in range(ranks)
                    for micro in range(accumulation)
                    for place in Share(batch, accumulation, ranks, rank).places(micro)
                )
            )
            for batch, accumulation, ranks in CUTS
        }
        assert trained == {tuple(sorted(plan.items(step)))}


def test_the_order_of_a_plain_data_set_is_that_of_the_first_release():
    """Runs go on from checkpoints of earlier versions."""
    released = [(9, 5), (1, 9), (0, 7), (3, 2), (4, 4), (6, 8), (10, 3)]
    assert plan_epoch(SHAPES, 4, 2, 2) == released
    assert plan_epoch(SHAPES, 4, 2, 2, pools_of_shapes(SHAPES)) == released


# Of one shape 10 draws of 4 items, so 2 or 3 each, and 3 items once; of another 2 items twice.
POOLED = (WIDE,) * 7 + (TALL,) * 2
POOLS = (Pool(WIDE, (0, 1, 2, 3), 10), Pool(WIDE, (4, 5, 6), 3), Pool(TALL, (7, 8), 4))


@pytest.mark.parametrize(("seed", "epoch", "per_step"), [(0, 0, 1), (3, 1, 1), (0, 5, 17)])
def test_a_pool_is_drawn_as_often_as_it_says_and_its_items_evenly(seed, epoch, per_step):
    steps = plan_epoch(POOLED, seed, epoch, per_step, POOLS)
    counts = Counter(item for step in steps for item in step)
    fill = Counter(item for step in steps for item in step[13 if POOLED[step[0]] == WIDE else 4 :])  # of the one short step
    counts -= fill if per_step > 1 else Counter()
    assert sorted(counts[item] for item in range(4)) == [2, 2, 3, 3]
    assert [counts[item] for item in range(4, 9)] == [1, 1, 1, 2, 2]
    assert len(steps) == BatchPlan(POOLED, seed, per_step, POOLS).steps_per_epoch


def test_which_items_come_once_more_changes_so_that_all_come_equally_often():
    counts = Counter(item for epoch in range(400) for step in plan_epoch(POOLED, 0, epoch, 1, POOLS) for item in step)
    assert sum(counts[item] for item in range(4)) == 4000
    for item in range(4):  # 2 and half of the time 3: standard deviation 10 over 400 epochs
        assert abs(counts[item] - 1000) < 50


def test_a_plan_with_pools_is_a_function_of_seed_and_epoch_and_not_of_history():
    plan = BatchPlan(POOLED, seed=7, samples_per_step=3, pools=POOLS)
    epochs = [plan_epoch(POOLED, 7, epoch, 3, POOLS) for epoch in (2, 0, 1)]
    in_order = [*epochs[1], *epochs[2], *epochs[0]]
    assert [plan.items(step) for step in range(3 * plan.steps_per_epoch)] == in_order
    fresh = BatchPlan(POOLED, seed=7, samples_per_step=3, pools=POOLS)
    assert fresh.items(2 * plan.steps_per_epoch) == epochs[0][0]

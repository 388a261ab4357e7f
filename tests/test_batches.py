"""Batches: what is drawn for a sample depends on (seed, position) and on nothing else."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from synthetic import SMALL, WIDE, latents_name, unit_stats, write_config, write_data

from mochi_lora.config.load import load_config
from mochi_lora.config.schema import ObjectiveConfig
from mochi_lora.data.cache import Cache
from mochi_lora.data.plan import BatchPlan, Share
from mochi_lora.data.samples import CachedSample, Posterior
from mochi_lora.errors import DamagedFileError
from mochi_lora.model.flow import LatentStats, draw_posterior
from mochi_lora.spec import Bucket
from mochi_lora.streams import Purpose, normal
from mochi_lora.training.batches import Batch, MicroSteps, SampleSource, steps_from

SEED = 11


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny):
    config = load_config(write_config(tmp_path_factory.mktemp("data") / "run.yaml", tiny), [])
    return config, write_data(config, clips=7)


@pytest.fixture
def make(data):
    config, index = data

    def source(**objective) -> SampleSource:
        settings = ObjectiveConfig(**{"caption_dropout": 0.3, "sigma": "stratified", "strata": 4, **objective})
        return SampleSource(Cache(config.data.cache), tuple(index.of("train")), unit_stats(), settings, SEED)

    return source


def samples(source: SampleSource, share: Share, *, steps: int, workers: int = 0) -> dict[int, tuple]:
    """Everything drawn, by global position, over all ranks of the launch."""
    plan = BatchPlan(tuple(Bucket.parse(entry.bucket) for entry in source.entries), SEED, share.samples_per_step)
    found = {}
    for rank in range(share.ranks):
        mine = Share(share.batch_size, share.accumulation, share.ranks, rank)
        for _, batches in steps_from(MicroSteps(source, plan, mine), mine, 0, steps, workers=workers, pin=False):
            for batch in batches:
                found |= {batch.positions[row]: row_of(batch, row) for row in range(len(batch.clips))}
    return found


def row_of(batch: Batch, row: int) -> tuple:
    length = batch.text.lengths[row]
    tensors = batch.clean[row], batch.noise[row], batch.sigma[row], batch.anchor[row], batch.text.tokens[row, :length]
    return (batch.clips[row], length, batch.sigmas[row], *(tensor.numpy().tobytes() for tensor in tensors))


CUTS = [
    Share(4, 1),
    Share(1, 4),
    Share(2, 2),
    Share(2, 1, ranks=2),
    Share(1, 2, ranks=2),
    Share(1, 1, ranks=4),
]


def test_ranks_micro_steps_and_loader_processes_change_nothing(make):
    source = make()
    whole = samples(source, CUTS[0], steps=6)
    assert sorted(whole) == list(range(24))
    assert {length == 0 for _, length, *_ in whole.values()} == {True, False}, "some captions are dropped, some are not"
    for cut in CUTS[1:]:
        assert samples(source, cut, steps=6) == whole, cut
    assert samples(source, CUTS[2], steps=6, workers=2) == whole


def test_every_batch_has_one_shape_and_all_micro_steps_of_a_step_share_it(make):
    source = make()
    share = Share(2, 2)
    plan = BatchPlan(tuple(Bucket.parse(entry.bucket) for entry in source.entries), SEED, 4)
    shapes = []
    for _, batches in steps_from(MicroSteps(source, plan, share), share, 0, 6, workers=0, pin=False):
        assert len({batch.clean.shape for batch in batches}) == 1
        shapes.append(batches[0].clean.shape[1:])
        assert batches[0].tokens == 2 * Bucket.parse(SMALL if shapes[-1][3] == 6 else WIDE).tokens
    assert len(set(shapes)) == 2


def test_starting_later_gives_the_rest(make):
    source = make()
    share = Share(2, 1)
    plan = BatchPlan(tuple(Bucket.parse(entry.bucket) for entry in source.entries), SEED, 2)

    def run(start: int) -> list[tuple]:
        steps = steps_from(MicroSteps(source, plan, share), share, start, 9, workers=0, pin=False)
        return [(step, row_of(batch, 0), row_of(batch, 1)) for step, (batch,) in steps]

    assert run(5) == run(0)[5:]
    assert run(9) == []


def test_the_same_clip_gets_new_draws_at_another_position_and_under_another_seed(make):
    source = make(caption_dropout=0.0)
    first, second = source.batch((0,), (0,)), source.batch((0,), (1,))
    other = SampleSource(source.cache, source.entries, source.stats, source.objective, SEED + 1).batch((0,), (0,))
    for batch in (second, other):
        assert not torch.equal(first.clean, batch.clean)
        assert not torch.equal(first.noise, batch.noise)
        assert first.sigmas != batch.sigmas


def test_the_posterior_is_drawn_in_raw_space_and_then_normalised(make, data):
    source = make()
    shifted = SampleSource(source.cache, source.entries, data_stats(data), source.objective, SEED)
    stored = source.cache.read_latents(latents_name(0))
    unit = torch.from_numpy(normal(SEED, Purpose.POSTERIOR, 5, tuple(stored.mean.shape)))
    raw = draw_posterior(stored.mean, stored.logvar, unit)
    assert torch.equal(source.batch((0,), (5,)).clean[0], raw)
    assert torch.equal(shifted.batch((0,), (5,)).clean[0], data_stats(data).normalise(raw))
    assert raw.dtype == torch.float32
    assert float((raw - stored.mean.float()).std()) == pytest.approx(np.exp(-3), rel=0.1), "logvar -6 is a deviation of e^-3"


def data_stats(data):
    _, index = data
    return LatentStats(index.latents_mean, index.latents_std, index.latents_scale)


def test_a_dropped_caption_is_the_null_prompt_and_leaves_the_cache_alone(make):
    source = make(caption_dropout=1.0)
    before = {path: path.read_bytes() for path in source.cache.root.rglob("*.safetensors")}
    batch = source.batch((0, 1), (0, 1))
    assert batch.text.lengths == (0, 0)
    assert batch.text.tokens.shape[1] == 1
    assert not batch.text.tokens.any()
    assert {path: path.read_bytes() for path in source.cache.root.rglob("*.safetensors")} == before
    assert make(caption_dropout=0.0).batch((0, 1), (0, 1)).text.lengths == (1, 2)


def test_dropping_a_caption_changes_no_other_draw_of_the_sample(make):
    with_text, without = (make(caption_dropout=chance).batch((0,), (3,)) for chance in (0.0, 1.0))
    for name in ("clean", "noise", "sigma", "anchor"):
        assert torch.equal(getattr(with_text, name), getattr(without, name)), name


def test_captions_are_dropped_one_by_one_at_the_given_rate(make):
    """Over 10,000 positions: the rate within five standard deviations, and neighbours independent."""
    source = make(caption_dropout=0.1)
    sample = source.cache.read_latents(latents_name(0)), source.cache.read_text(source.entries[0].text)
    small = Posterior(sample[0].mean[:, :1, :1, :1], sample[0].logvar[:, :1, :1, :1])
    item = CachedSample("clip", Bucket.parse(SMALL), small, sample[1])
    dropped = np.array([source._draw(item, position)[2].length == 0 for position in range(10_000)])
    assert abs(dropped.mean() - 0.1) < 5 * (0.1 * 0.9 / 10_000) ** 0.5
    pairs = (dropped[1:] & dropped[:-1]).mean()
    assert abs(pairs - 0.01) < 5 * (0.01 * 0.99 / 10_000) ** 0.5


def test_the_anchor_frame_is_one_of_the_clip(make):
    source = make()
    anchors = [int(source.batch((0,), (position,)).anchor) for position in range(40)]
    assert set(anchors) == {0, 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_entry_is_named_without_a_traceback_in_the_message(make, tmp_path, workers):
    """An exception that crosses a loader process arrives with that process's traceback as its message."""
    good = make()
    shutil.copytree(good.cache.root, tmp_path / "cache")
    source = SampleSource(Cache(tmp_path / "cache"), good.entries, good.stats, good.objective, SEED)
    for number in range(7):
        path = source.cache.path("latents", latents_name(number))
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedFileError) as caught:
        samples(source, Share(1, 1), steps=1, workers=workers)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "cache" / "latents"))
    assert "run encode again" in message
    assert "Traceback" not in message


_threads_at_fork: list[bool] = []  # a hook cannot be taken back: it looks here
os.register_at_fork(
    after_in_child=lambda: _threads_at_fork and threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
)


@pytest.mark.parametrize("thread_at_fork", [False, True])
def test_loader_processes_outlive_a_signal_to_the_whole_group(make, monkeypatch, thread_at_fork):
    """torchrun and schedulers signal every process; a loader that dies takes the run with it before it is saved. Telemetry
    libraries start a thread of their own in every forked process, and a signal may choose that one."""
    monkeypatch.setattr(sys.modules[__name__], "_threads_at_fork", [True] if thread_at_fork else [])
    source = make()
    share = Share(1, 1)
    plan = BatchPlan(tuple(Bucket.parse(entry.bucket) for entry in source.entries), SEED, 1)
    others = set(multiprocessing.active_children())
    steps = steps_from(MicroSteps(source, plan, share), share, 0, 30, workers=1, pin=False)
    next(steps)
    (child,) = set(multiprocessing.active_children()) - others
    for name in ("INT", "TERM"):
        subprocess.run(["sh", "-c", f"kill -{name} {child.pid}"], check=True)
    assert len(list(steps)) == 29


def test_moving_a_batch_keeps_what_it_says(make):
    batch = make().batch((0, 1), (0, 1))
    moved = batch.to(torch.device("cpu"))
    assert row_of(moved, 1) == row_of(batch, 1)
    assert moved.text.lengths == batch.text.lengths

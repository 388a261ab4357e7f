"""`mochi-lora plan`: what it prints for a GPU that is not here, what it refuses, and a measurement on this CPU."""

import re
from dataclasses import replace

import pytest
import torch
from synthetic import make_run
from test_footprint import WORK

from mochi_lora.cli import main
from mochi_lora.commands import plan as room
from mochi_lora.config.load import load_config
from mochi_lora.engine.plan import Plan
from mochi_lora.planning.cards import card_named
from mochi_lora.planning.choice import Choice, Room, choose, forecast, room_of
from mochi_lora.planning.pace import decoding_seconds, seconds_per_guided_step, seconds_per_pass
from mochi_lora.planning.resolve import Resolved
from mochi_lora.planning.workload import ModelSize
from mochi_lora.runs.plan import RunPlan
from mochi_lora.runs.workloads import Base, sampling_work


@pytest.fixture
def mochi(tmp_path):
    """A configuration of the real model, of which nothing is here."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{clips: {tmp_path / 'clips'}, cache: {tmp_path / 'cache'}}}\nmodel: {{base: nobody/at-home}}\n")
    return path


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a plan reads no weight")

    monkeypatch.setattr(room, "random_transformer", load)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def told(capsys, *words):
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    assert main(["plan", *map(str, words)]) == 1
    return capsys.readouterr().err


@pytest.mark.usefixtures("no_weights")
def test_a_measured_gpu_gets_figures_and_one_pick(mochi, capsys):
    text = told(capsys, "--config", mochi, "--gpu", "H200")
    assert "published dimensions are taken" in text
    assert "measured: one H200" in text
    (row,) = [line for line in text.splitlines() if "pick " in line]
    assert re.search(r"fp8 +│ none +│ 0 +│ \d+\.\d ", row)
    assert " to " not in row
    assert "picked   precision fp8, attention cudnn, checkpointing none, compile true" in text
    assert re.search(r"price    \$ \d", text)
    assert re.search(r"video    37x480x848, 64 steps: \d+ s, \$ 0\.\d+, as sample plans it: precision bf16, ", text)


@pytest.mark.usefixtures("no_weights")
def test_a_gpu_nobody_measured_is_an_estimate_with_its_range(mochi, capsys):
    text = told(capsys, "--config", mochi, "--gpu", "RTX 3060")
    assert re.search(r"price +none known for RTX 3060; --price gives yours", text)
    assert "$" not in text
    text = told(capsys, "--config", mochi, "--gpu", "RTX 3090", "--price", "2")
    assert "an estimate from its datasheet: nobody measured this GPU" in text
    (row,) = [line for line in text.splitlines() if "pick " in line]
    assert "fp8" not in text.split("picked")[1]
    assert len(re.findall(r"\d to \d", row)) == 3  # s/step, hours, dollars
    seconds, dollars = video_line(text)
    assert dollars == pytest.approx([2 * each / 3600 for each in seconds], abs=2e-3)
    assert len(seconds) == 2
    assert "too large" in text


def video_line(text: str) -> tuple[list[float], list[float]]:
    """Seconds and dollars of one video: one number each, or both ends of a range."""
    (line,) = [line for line in text.splitlines() if line.startswith("video ")]
    found = re.search(r"steps: (\d+)(?: to (\d+))? s(?:, \$ (\d+\.\d+)(?: to (\d+\.\d+))?)?", line)
    numbers = [float(text) if text else None for text in found.groups()]
    return [each for each in numbers[:2] if each is not None], [each for each in numbers[2:] if each is not None]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("gpu", ["H200", "RTX 4090"])
def test_the_cost_of_a_video_is_of_the_plan_that_sample_takes(mochi, capsys, monkeypatch, gpu):
    """Training rounds the base where that is faster, and leaves room for a step; `sample` does neither."""
    config = load_config(mochi, [])
    monkeypatch.setattr("mochi_lora.runs.workloads.base_here", lambda _config: Base(ModelSize.of({}), None))
    card, work = card_named(gpu), sampling_work(config)
    own = choose(config.engine, work, card, room_of(card.memory_gib, 64.0), card.fastest_attention("bf16")).pick.plan
    expected = 64 * seconds_per_guided_step(own, work, card) + decoding_seconds(work.bucket, card)
    text = told(capsys, "--config", mochi, "--gpu", gpu)
    assert video_line(text)[0] == pytest.approx([factor * expected for factor in sorted(set(card.spread(own)))], abs=0.51)
    assert f"as sample plans it: {own}" in text
    assert "picked   precision fp8" in text, "both plans are the same: this test cannot fail"


@pytest.mark.usefixtures("no_weights")
def test_on_the_gpu_that_is_here_run_and_video_are_planned_as_their_commands_plan_them(mochi, capsys, monkeypatch):
    """No GPU here: `resolve_plan` stands in for one, with what is free on it."""
    card, asked = card_named("H200"), []

    def resolve(engine, work, room=None):
        asked.append((work, room))
        found = choose(engine, work, card, Room(40.0, 64.0), "cudnn" if work.adapter else "flash4")
        return Resolved(found.pick.plan, found)

    monkeypatch.setattr(room, "resolve_device", lambda _setting: "cuda")
    monkeypatch.setattr(room, "resolve_plan", resolve)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    text = told(capsys, "--config", mochi)
    (training, _), (sampling, free) = asked
    assert training.adapter is not None
    assert replace(training, bucket=sampling.bucket, adapter=None) == sampling
    assert free == Room(40.0, 64.0)
    assert "picked   precision fp8, attention cudnn" in text
    assert "as sample plans it: precision bf16, attention flash4" in text


def test_a_gpu_that_is_full_while_it_is_looked_at_is_told_and_no_traceback(mochi, capsys, monkeypatch):
    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(room, "resolve_device", lambda _setting: "cuda")
    monkeypatch.setattr(room, "resolve_plan", full)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["plan", "--config", str(mochi)]) == 1
    assert "the GPU's memory is full (CUDA out of memory.)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("words", [("--sample.prompts", "[]"), ("--train.sample_every", "0")])
def test_a_run_without_videos_is_told_what_one_costs_as_well(mochi, capsys, words):
    usual = told(capsys, "--config", mochi, "--gpu", "H200", "--price", "2")
    text = told(capsys, "--config", mochi, "--gpu", "H200", "--price", "2", *words)
    assert video_line(text) == video_line(usual)
    long = told(capsys, "--config", mochi, "--gpu", "H200", "--price", "2", *words, "--sample.frames", "163")
    assert video_line(long)[1][0] > 4 * video_line(text)[1][0]


@pytest.mark.usefixtures("no_weights")
def test_a_video_that_could_not_be_made_is_told_why_beside_the_prediction_for_training(mochi, capsys):
    words = ("--config", mochi, "--train.sample_every", "0")
    text = told(capsys, *words, "--memory", "9GiB", "--data.buckets", "[7x480x848]", "--sample.frames", "163")
    assert "video    163x480x848, 64 steps: no plan fits this GPU: of the smallest" in text
    assert "picked   precision " in text
    shared = ("--gpu", "H200", "--engine.parallel", "context:4", "--data.buckets", "[163x480x848]")
    text = told(capsys, *words, *shared)
    assert "video    37x480x848, 64 steps: engine.parallel: context:4 does not divide the 11130 visual tokens" in text


@pytest.mark.usefixtures("no_weights")
def test_a_video_on_several_gpus_costs_the_time_of_those_that_make_it(mochi, capsys):
    words = ("--config", mochi, "--gpu", "H200", "--price", "2", "--gpus", "2")
    (alone,), (dollars,) = video_line(told(capsys, *words))
    assert dollars == pytest.approx(2 * alone / 3600, abs=1e-3)
    (shared,), (both,) = video_line(told(capsys, *words, "--engine.parallel", "context:2"))
    assert shared < 0.8 * alone
    assert both == pytest.approx(2 * 2 * shared / 3600, abs=1.5e-3)


@pytest.mark.parametrize("price", ["-3", "0", "nan"])
def test_a_price_that_is_none_is_refused(mochi, capsys, price):
    assert main(["plan", "--config", str(mochi), "--gpu", "H200", "--price", price]) == 2
    assert re.search(rf"argument --price: {price}: expected .*number", capsys.readouterr().err)


@pytest.mark.usefixtures("no_weights")
def test_memory_alone_borrows_the_pace_of_the_card_nearest_to_it(mochi, capsys):
    text = told(capsys, "--config", mochi, "--memory", "16GiB")
    assert "times are those of an RTX 4060 Ti 16GB: --gpu names another" in text
    assert "15.4 GiB free" in text


@pytest.mark.usefixtures("no_weights")
def test_settings_by_hand_and_settings_of_the_run_count(mochi, capsys):
    words = ("--config", mochi, "--gpu", "H200")
    assert "precision bf16, attention flash4, checkpointing full" in told(
        capsys, *words, "--engine.precision", "bf16", "--engine.attention", "flash4", "--engine.checkpointing", "full"
    )
    short, long = (told(capsys, *words, "--train.steps", steps, "--train.sample_every", "0") for steps in (1000, 4000))
    hours = [float(re.search(r"pick .*│ +(\d+\.\d) +│ +\d+\.\d\d +│", text)[1]) for text in (short, long)]
    assert hours[1] == pytest.approx(4 * hours[0], rel=0.5)
    assert "37x480x848 at most, batch 2 x 3, 1000 steps" in told(
        capsys, *words, "--train.batch_size", "2", "--train.gradient_accumulation", "3"
    )


def test_what_cannot_be_answered_is_refused_with_a_way_out(mochi, capsys):
    assert "there is no GPU here: name one with --gpu (H200, H100" in refused(capsys, "--config", mochi)
    assert "--measure runs on this machine" in refused(capsys, "--config", mochi, "--gpu", "H200", "--measure")
    assert "--memory much: expected a size above 0 such as 24GiB" in refused(capsys, "--config", mochi, "--memory", "much")
    assert "no plan fits this GPU" in refused(capsys, "--config", mochi, "--gpu", "H200", "--memory", "4GiB")
    assert "names 60 blocks, the model has 48" in refused(
        capsys, "--config", mochi, "--gpu", "H200", "--engine.checkpointing", "full:60,none"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_kernel_that_the_named_card_lacks_is_refused_as_a_start_on_it_would(mochi, capsys):
    words = ("--config", mochi, "--gpu", "RTX 3090")
    assert "RTX 3090 has no fp8 matrix products" in refused(capsys, *words, "--engine.precision", "fp8")
    assert "this GPU has 8.6; set it to auto" in refused(capsys, *words, "--engine.attention", "flash4")
    text = told(capsys, "--config", mochi, "--gpu", "H200", "--engine.precision", "fp32")
    assert "picked   precision fp32, attention efficient" in text, "cudnn and flash take no float32"


@pytest.mark.usefixtures("no_weights")
def test_held_out_losses_are_in_the_hours_once_it_is_known_how_many(mochi, capsys):
    words = ("--config", mochi, "--gpu", "H200")
    assert "hours    without held-out losses" in told(capsys, *words)
    assert "held-out" not in told(capsys, *words, "--train.validate_every", "0")
    config, card = load_config(mochi, []), card_named("H200")
    launch, _ = room._asked(config, 1)
    plan = Plan("cuda", "bf16", "cudnn", "none", compile=True)
    hours = [room.run_hours(replace(launch, held_out=(launch.work.bucket,) * count), plan, card) for count in (0, 30)]
    looks = (1 + config.train.steps // config.train.validate_every) * config.train.validation_bands * 30
    one = seconds_per_pass(plan, replace(launch.work, batch=1), card)
    assert hours[1] - hours[0] == pytest.approx(looks * one / 3600)


@pytest.mark.usefixtures("no_weights")
def test_several_gpus_get_a_plan_for_each_and_the_ways_to_share_them(mochi, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "180")
    text = told(capsys, "--config", mochi, "--gpu", "H200", "--gpus", "8", "--price", "2")
    assert "gpu      8 x H200, 139.2 GiB free" in text
    assert "links    369 GB/s to GPUs of the same host (8 each): from datasheets, nobody measured them" in text
    assert "shared   data:8, 8 samples per step" in text
    assert "predicted for each GPU of data:8, attention cudnn" in text
    plans, ways = text.split("ways to share 8 GPUs")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ways.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [["this", "data:8"], ["", "data:4,context:2"], ["", "data:8,shard:8"]]
    seconds, samples, hourly, dollars = zip(*([float(cell) for cell in row[7:]] for row in rows), strict=True)
    assert samples == (8, 4, 8)
    for row in zip(seconds, samples, hourly, dollars, strict=True):
        assert row[2] == pytest.approx(row[1] * 3600 / row[0], rel=0.01)
        assert row[3] == pytest.approx(8 * 2 * 1000 / row[2], rel=0.02)
    assert seconds[1] < 0.7 * seconds[0]
    peak, sent = ([float(row[place]) for row in rows] for place in (5, 6))
    assert peak[0] > peak[2] > peak[1]
    assert sent[1] > 10
    assert sent[2] > 10
    assert sent[0] == pytest.approx(0.13, abs=0.05)
    (pick,) = [line.split("│")[-4:-1] for line in plans.splitlines() if "pick " in line]
    assert float(pick[2]) == pytest.approx(8 * 2 * float(pick[1]), abs=1)


@pytest.mark.usefixtures("no_weights")
def test_ways_that_would_not_start_are_told_with_the_setting_to_change(mochi, capsys):
    words = ("--config", mochi, "--gpu", "H200", "--gpus", "8", "--data.buckets", "[163x480x848]")
    text = told(capsys, *words).split("ways to share")[1]
    assert "│ data:2,context:4 " not in text
    for layout, size in (("data:2,context:4", 4), ("context:8", 8), ("context:8,shard:8", 8)):
        (line,) = [line for line in text.splitlines() if line.startswith(f"refused  {layout}: ")]
        assert f"context:{size} does not divide the 11130 visual tokens of 37x480x848; take one of 1, 2, 3, 6" in line
        assert "only the videos of sample are 37x480x848 (frames, height, width): as 163x480x848, like the clips" in line
    mended = told(capsys, *words, "--sample.frames", "163").split("ways to share")[1]
    assert "refused" not in mended
    assert "│ context:8 " in mended
    clips = told(capsys, *words[:-1], "[37x480x848]").split("ways to share")[1]
    assert "refused  context:8: engine.parallel: context:8 does not divide the 11130" in clips
    assert "only the videos" not in clips


@pytest.mark.usefixtures("no_weights")
def test_a_named_layout_counts_its_gpus_and_is_refused_as_a_start_would(mochi, capsys):
    words = ("--config", mochi, "--gpu", "RTX 4090")
    text = told(capsys, *words, "--engine.parallel", "context:2", "--engine.plan", "smallest")
    assert "2 x RTX 4090" in text
    assert "predicted for each GPU of context:2" in text
    tokens = "context:4 does not divide the 11130 visual tokens of 37x480x848; take one of 1, 2, 3, 6"
    assert tokens in refused(capsys, *words, "--engine.parallel", "context:4")
    assert "does not divide the model's 24 heads" in refused(capsys, *words, "--gpus", "5", "--engine.parallel", "context:5")
    assert "expected data x context = 6" in refused(capsys, *words, "--gpus", "6", "--engine.parallel", "data:2,context:2")
    assert "in one process: leave --gpu, --memory, --gpus" in refused(capsys, "--config", mochi, "--measure", "--gpus", "2")


@pytest.mark.usefixtures("no_weights")
def test_where_nothing_fits_one_gpu_the_base_is_split_and_that_is_said(mochi, capsys):
    words = ("--config", mochi, "--gpu", "RTX 4060 Ti", "--engine.precision", "bf16", "--engine.block_swap", "0")
    assert "no plan fits this GPU" in refused(capsys, *words)
    text = told(capsys, *words, "--gpus", "8")
    assert "split    no plan fits one GPU whole, so the base is split over all of them: data:8,shard:8" in text
    assert "parallel shard:8" in text.split("picked")[1]
    (alone,) = [line for line in text.split("ways to share")[1].splitlines() if "│ data:8 " in line]
    assert "nothing fits" in alone
    words = (*words, "--gpus", "8", "--sample.step_cache", "0.1")
    assert "step_cache: got 0.1 with engine.parallel data:8,shard:8" in refused(capsys, *words)


def test_a_few_real_steps_are_measured_on_this_cpu(tiny, tmp_path, capsys):
    run = make_run(tmp_path / "start", tiny)
    text = told(capsys, "--config", run, "--measure")
    assert "plan     precision fp32, attention auto, checkpointing none" in text
    assert "5 steps at 7x32x64" in text  # the larger of the clips' two shapes
    assert re.search(r"s/step +│ - +│ 0\.\d{3}", text)


def test_a_full_gpu_is_told_the_plan_what_was_predicted_and_the_next_smaller():
    card, plan = card_named("H200"), Plan("cuda", "bf16", "cudnn", "none", compile=True)
    smaller = forecast(Plan("cuda", "bf16", "cudnn", "attention_saved", compile=True), WORK, card)
    choice = Choice(forecast(plan, WORK, card), Room(80.0, 200.0), fits=True, smaller=smaller, card=card)
    words = RunPlan(plan, choice, 0.9).when_full()
    assert "The plan was precision bf16, attention cudnn, checkpointing none, compile true: predicted were 7" in words
    assert "of 80.0 free at the start" in words
    assert f"The next smaller plan is predicted to take {smaller.footprint.device:.1f} GiB" in words
    assert "set, below engine, precision bf16, attention cudnn, checkpointing attention_saved, compile true" in words
    assert RunPlan(plan, choice, 0.9).metrics() == {
        "memory/predicted_gib": choice.pick.footprint.device,
        "time/predicted_seconds_per_step": 0.9,
    }
    assert RunPlan(Plan("cpu", "fp32", "auto", "none"), None, None).when_full() is None

"""More processes, fewer, one killed: the run is the one that a single process would have made."""

import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from gang import together
from safetensors.torch import load_file
from synthetic import distance, make_run, records
from warm_processes import Place, ended, start

from mochi_lora.cli import main
from mochi_lora.commands import train
from mochi_lora.config.engine import EngineConfig, parallel_sizes
from mochi_lora.config.load import load_config
from mochi_lora.config.schema import Config
from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError
from mochi_lora.inference.playback import read_video
from mochi_lora.parallel.mesh import Layout, Ranks, check_layout, layout_of, layouts_of, least_world
from mochi_lora.planning.choice import NoPlanFitsError, Room, check_settings
from mochi_lora.planning.footprint import GIB, predict_memory, weight_bytes
from mochi_lora.planning.resolve import Resolved
from mochi_lora.planning.workload import AdapterSize, ModelSize, Workload
from mochi_lora.runs import models, processes
from mochi_lora.runs import plan as plan_room
from mochi_lora.spec import Bucket
from mochi_lora.training.checkpoint import newest_checkpoint

TESTS = Path(__file__).parent
WORK = Workload(ModelSize.of({}), Bucket(37, 480, 848), 1, 1, AdapterSize(10_000_000, 8, averaged=False), None)
STEPS, SAMPLES = 6, 6
SETTINGS = {
    "objective": {"caption_dropout": 0.3},
    "train": {"steps": STEPS, "validate_every": 3, "ema_decay": 0.9, "lr_schedule": "constant", "checkpoint_every": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny):
    """The configuration, and what one process made of it in `run`."""
    path = make_run(tmp_path_factory.mktemp("scale"), tiny, **SETTINGS)
    assert launched(path.parent, path, path.parent / "run", 1) == [0]
    return path


def launched(folder: Path, config: Path, run: Path, ranks: int, *words: str, batch: int | None = None) -> list[int]:
    """Exit statuses of `ranks` processes that train with six samples a step between them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    each = batch or SAMPLES // ranks
    words = ("train", "--config", str(config), "--run.folder", str(run), "--train.batch_size", str(each), *words)
    logs = [folder / f"{ranks}-rank{rank}.log" for rank in range(ranks)]
    started = [start(list(words), log, place=Place(rank, ranks, port)) for rank, log in enumerate(logs)]
    statuses = [ended(process) for process in started]
    print(*(log.read_text() for log in logs))  # shown where the test fails
    return statuses


def require_same(run: Path, expected: Path) -> None:
    for kind in ("train", "heldout"):
        for one, other in zip(records(run, kind), records(expected, kind), strict=True):
            assert one == pytest.approx(other, rel=1e-5), kind
    assert distance(run / "adapter.safetensors", expected / "adapter.safetensors") < 1e-5
    state = f"checkpoints/step-{STEPS:06d}/adapter.safetensors"
    assert distance(run / state, expected / state) < 1e-5


@pytest.mark.slow
def test_two_ranks_then_one_then_three_are_one_that_went_through(data, tmp_path):
    run = tmp_path / "run"
    for ranks, steps in ((2, 2), (1, 4), (3, STEPS)):
        assert launched(tmp_path, data, run, ranks, "--train.steps", str(steps)) == [0] * ranks
    told = [" ".join((tmp_path / f"{ranks}-rank0.log").read_text().split()) for ranks in (1, 3)]
    assert "the processes were data:2, now they are data:1" in told[0]
    assert "the processes were data:1, now they are data:3" in told[1]
    expected = data.parent / "run"
    assert distance(run / "adapter.safetensors", expected / "adapter.safetensors") < 1e-5
    for one, other in zip(records(run), records(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_from_a_split_base_alone_with_shared_tokens_and_split_otherwise(data, tmp_path):
    """What is trained, its optimiser and the place in the data are whole in every checkpoint, however the work was shared."""
    run, expected = tmp_path / "run", data.parent / "run"
    before = None
    for ranks, parallel, steps in ((2, "shard:2", 2), (1, "auto", 3), (2, "context:2", 4), (3, "shard:3", STEPS)):
        layout = layout_of(parallel, ranks)
        words = ["--train.steps", str(steps), "--engine.parallel", parallel]
        assert launched(tmp_path, data, run, ranks, *words, batch=SAMPLES // layout.data) == [0] * ranks
        told = " ".join((tmp_path / f"{ranks}-rank0.log").read_text().split())
        if before is not None:
            assert f"the processes were {before}, now they are {layout}" in told
        before = layout
    for one, other in zip(records(run), records(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert records(run, "heldout")[-1] == pytest.approx(records(expected, "heldout")[-1], rel=1e-5)
    assert distance(run / "adapter.safetensors", expected / "adapter.safetensors") < 1e-5
    found = [newest_checkpoint(folder / "checkpoints") for folder in (run, expected)]
    assert [one.step for one in found] == [STEPS, STEPS]
    moments = [one.state["optimizer"]["state"] for one in found]
    assert moments[0].keys() == moments[1].keys()
    for name, tensors in moments[0].items():
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(tensors[key], moments[1][name][key], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["auto", "shard:2"])
def test_two_ranks_that_accumulate_are_one_process_with_the_same_samples(data, tmp_path, parallel):
    """Gradients of micro-batches are added up before the ranks exchange theirs."""
    words = ["--train.gradient_accumulation", "3", "--engine.parallel", parallel]
    assert launched(tmp_path, data, tmp_path / "run", 2, *words, batch=1) == [0, 0]
    require_same(tmp_path / "run", data.parent / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(2, "context:2"), (4, "data:2,context:2")])
def test_ranks_that_share_tokens_are_one_process(data, tmp_path, ranks, parallel):
    words = ["--engine.parallel", parallel, "--train.sample_every", str(STEPS)]
    batch = SAMPLES // layout_of(parallel, ranks).data
    run = tmp_path / "run"
    assert launched(tmp_path, data, run, ranks, *words, batch=batch) == [0] * ranks
    require_same(run, data.parent / "run")
    adapters = [load_file(tmp_path / f"{ranks}-rank{rank}.safetensors") for rank in range(ranks)]
    assert all((tensor == other[name]).all() for other in adapters for name, tensor in adapters[0].items())
    assert sorted(path.name for path in (run / "samples" / f"step-{STEPS:06d}").iterdir()) == [
        "000-a-lighthouse-seed0.mp4",
        "sheet.png",
    ]


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed_and_it_ends_as_if_nothing_was(data, tmp_path):
    run, marker = tmp_path / "run", tmp_path / "died"
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    words = [str(TESTS / "die_once.py"), str(marker), "train", "--config", str(data), "--run.folder", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*program, *words, "--train.batch_size", str(SAMPLES // 2)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert marker.exists(), "a rank was killed"
    assert "continuing at step 2" in done.stdout
    require_same(run, data.parent / "run")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["auto", "context:2", "shard:2"])
def test_two_processes_make_the_videos_of_one(data, tmp_path, parallel):
    """Three videos: shared out, or each by both; one process writes each and one writes the sheet."""
    words = ["sample", "--config", str(data), "--sample.seeds", "[0, 1, 2]", "--engine.parallel"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = start([*words, "auto", "--output", str(tmp_path / "one")], tmp_path / "log")
    output = ["--output", str(tmp_path / "both")]
    ranks = [start([*words, parallel, *output], tmp_path / f"rank{n}.log", place=Place(n, 2, port)) for n in range(2)]
    statuses = [ended(process) for process in (alone, *ranks)]
    assert statuses == [0, 0, 0], "".join(log.read_text() for log in tmp_path.glob("*log"))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "both").iterdir())
    assert sum(name.endswith(".mp4") for name in names) == 3
    for name in names:
        if name.endswith(".mp4"):
            one, both = (read_video(tmp_path / folder / name).frames.astype(int) for folder in ("one", "both"))
            assert abs(one - both).mean() < 5, "rounding, and what the codec makes of it; another seed is 25 away"


def test_a_layout_counts_data_ranks_first_and_context_ranks_are_neighbours():
    layout = layout_of("data:2,context:3,shard:6", 6)
    places = [(Ranks(layout, rank).data_rank, Ranks(layout, rank).context_rank) for rank in range(6)]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [Ranks(layout, rank).shard_rank for rank in range(6)] == list(range(6))
    assert layout_of("auto", 6) == Layout(6)
    assert layout_of("context:2", 6).data == 3


@pytest.mark.parametrize("layout", [Layout(3), Layout(4, context=2), Layout(4, shard=2), Layout(1)])
def test_every_number_is_kept_once_and_ranks_that_need_each_other_have_equally_many(layout):
    ranks = [Ranks(layout, rank) for rank in range(layout.world)]
    for count in range(8):
        kept = [number for rank in ranks for number in rank.own(count) if rank.keeps(number)]
        assert sorted(kept) == list(range(count))
        if layout.together:
            assert len({len(rank.own(count)) for rank in ranks}) == 1
        for rank in ranks:
            assert rank.own(count) == ranks[rank.rank - rank.context_rank].own(count), "of one group, the same"


@pytest.mark.parametrize(
    ("setting", "world", "told"),
    [
        ("data:2,context:2", 6, "got data:2,context:2 for a launch of 6 processes; expected data x context = 6, here it is 2"),
        ("context:2", 1, "got context:2 for a launch of 1 process; expected data x context = 1, here it is 1 x 2. Start 2"),
        ("shard:4", 6, "take one of 1, 2, 3, 6"),
    ],
)
def test_sizes_that_do_not_come_out_are_refused(setting, world, told):
    with pytest.raises(UserError) as refused:
        layout_of(setting, world)
    assert told in str(refused.value)


def test_heads_and_tokens_must_divide_and_it_is_said_what_would():
    at_37, at_163 = Bucket(37, 480, 848), Bucket(163, 480, 848)
    for size in (2, 3, 6):
        check_layout(Layout(size, context=size), 24, [at_37, at_163])
    for size in (4, 8):
        check_layout(Layout(size, context=size), 24, [at_163])
    with pytest.raises(UserError, match="context:5 does not divide the model's 24 heads; take one of 1, 2, 3, 4, 6, 8, 12, 24"):
        check_layout(Layout(5, context=5), 24, [])
    with pytest.raises(UserError, match="context:4 does not divide the 11130 visual tokens of 37x480x848; take one of 1, 2, 3"):
        check_layout(Layout(4, context=4), 24, [at_163, at_37])


def test_ranks_that_share_a_base_do_not_spare_steps_of_different_videos():
    check_layout(Layout(4, context=2, shard=2), 24, [], step_cache=0.1)
    check_layout(Layout(4, shard=4), 24, [])
    with pytest.raises(UserError, match=r"step_cache: got 0\.1 with engine\.parallel data:4,shard:4"):
        check_layout(Layout(4, shard=4), 24, [], step_cache=0.1)


def test_what_is_not_understood_is_refused_with_what_would_be():
    assert parallel_sizes(" data:4, context:2") == {"data": 4, "context": 2}
    for wrong in ("data", "data:0", "tensor:2", "data:2,data:2", ""):
        with pytest.raises(ValueError, match="sizes of data, context, shard, each once at most, such as data:4,context:2"):
            parallel_sizes(wrong)


def test_a_sharded_base_is_neither_swapped_nor_offloaded():
    for setting, value in (("block_swap", 1), ("cpu_offload", True)):
        engine = EngineConfig(parallel="shard:2", **{setting: value})
        with pytest.raises(UserError, match=rf"engine\.{setting}: got {value} with engine\.parallel shard:2"):
            check_settings(engine, WORK)


def test_a_share_of_the_base_or_of_the_tokens_takes_less_of_a_gpu():
    """By the parts that are gone; docs/performance.md has what two GPUs held."""
    plan = Plan("cuda", "bf16", "auto", "full", compile=True)
    whole = predict_memory(plan, WORK).device
    sharded = predict_memory(replace(plan, shard=2), WORK).device
    assert whole - sharded == pytest.approx(46 / 96 * 18.3, rel=0.1), "half of 48 blocks, but for two that are gathered"
    context = predict_memory(replace(plan, context=2), replace(WORK, context=2)).device
    standing = weight_bytes(WORK.model, "bf16") / GIB + WORK.adapter.bytes / GIB
    assert (context - standing) / (whole - standing) < 0.65


def test_auto_splits_the_base_only_where_nothing_fits_and_a_named_layout_is_left_alone(monkeypatch):
    def full(engine: EngineConfig, work: Workload, _room: None) -> Resolved:
        if engine.parallel == "shard:2" or work is None:
            return Resolved(Plan("cuda", "bf16", "auto", "full", shard=2 if engine.parallel == "shard:2" else 1), None)
        raise (NoPlanFitsError if engine.precision == "auto" else UserError)("no plan fits this GPU")

    monkeypatch.setattr(plan_room, "resolve_plan", full)
    assert plan_room._resolved(EngineConfig(), WORK, Layout(2), None).shard == 2
    assert plan_room._resolved(EngineConfig(), None, Layout(2), None).shard == 1
    kept = (
        (EngineConfig(), Layout(1)),
        (EngineConfig(parallel="data:2"), Layout(2)),
        (EngineConfig(block_swap=8), Layout(2)),  # would be told that it asked for a shard
        (EngineConfig(precision="fp8"), Layout(2)),  # another error than too little memory
    )
    for engine, layout in kept:
        with pytest.raises(UserError, match="no plan fits"):
            plan_room._resolved(engine, WORK, layout, None)


def test_the_group_is_ended_with_the_work_and_not_after_a_failure(monkeypatch):
    """Where a peer is gone it would be waited for."""
    left = []
    monkeypatch.setattr(processes.Accelerator, "end_training", lambda _self: left.append("ended"))
    with processes.open_processes("cpu", 1.0):
        assert left == []
    assert left == ["ended"]
    with pytest.raises(UserError), processes.open_processes("cpu", 1.0):
        raise UserError("no such clip")
    assert left == ["ended"]


def settled(_ranks: Ranks, needed: float) -> tuple[str, float]:
    """Of a plan that takes `needed` GiB whole and half of it split, on a free GPU and one that is nearly full."""

    def resolve(engine: EngineConfig, _work: Workload, room: Room) -> Resolved:
        shard = parallel_sizes(engine.parallel).get("shard", 1)
        if needed / shard > room.device:
            raise NoPlanFitsError(f"rank {dist.get_rank()}: no plan fits {room.device:g} GiB")
        return Resolved(Plan("cuda", "bf16", "auto", "full", shard=shard), None)

    plan_room.resolve_plan = resolve
    plan_room._expected = lambda _config, plan, _work, _buckets, _device, room: (plan.shard, room.device)
    plan_room.training_work = plan_room.base_of = lambda *_: None
    processes.room_here = lambda _device: Room(80.0 if dist.get_rank() == 0 else 12.0, 64.0)
    here = SimpleNamespace(device=torch.device("cuda"))
    try:
        return plan_room.plan_of_run(Config(), None, Path(), [], here, Layout(2))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("needed", "found"), [(10, (1, 12.0)), (20, (2, 12.0)), (60, "rank 0: no plan fits 12 GiB")])
def test_the_fullest_gpu_decides_for_all_and_a_refusal_is_everybodys(needed, found):
    assert together(2, settled, needed) == [found, found]


def test_a_stored_plan_whose_kernels_this_card_lacks_is_made_anew(monkeypatch, capsys):
    """A run comes back on another card: the plan of its first start would end with a kernel's error."""
    stored = Plan("cpu", "fp32", "cudnn", "none")
    found = SimpleNamespace(state={"progress": {"plan": asdict(stored), "engine": EngineConfig().model_dump(mode="json")}})
    monkeypatch.setattr(plan_room, "training_work", lambda *_: WORK)
    monkeypatch.setattr(plan_room, "base_of", lambda *_: None)
    here = SimpleNamespace(device=torch.device("cpu"))

    def resumed() -> Plan:
        return plan_room.plan_of_run(Config(), found, Path(), [], here, Layout()).plan

    assert resumed() == replace(stored, attention="auto"), "there is no cuDNN on a CPU"
    told = " ".join(capsys.readouterr().out.split())
    assert "the plan of the run's first start does not run here (engine.attention: cudnn " in told
    assert "the engine changed since the checkpoint (attention: cudnn -> auto)" in told
    kept = replace(stored, attention="math", checkpointing="full")
    found.state["progress"]["plan"] = asdict(kept)
    assert resumed() == kept, "what runs here is kept"


def test_the_fewest_processes_of_a_setting_are_those_it_names():
    assert [least_world(setting) for setting in ("auto", "context:2", "shard:4", "context:2,shard:4", "data:2,context:3")] == [
        *(1, 2, 4, 4, 6)
    ]
    for setting in ("context:6,shard:4", "shard:3", "data:2,context:2,shard:2"):
        assert layout_of(setting, least_world(setting)).world == least_world(setting)


def test_ways_to_share_are_all_different_and_each_is_the_layout_of_its_name():
    assert layouts_of(1) == [Layout(1)]
    for world in (2, 6, 8):
        every = layouts_of(world)
        assert len(set(every)) == len(every)
        assert [layout_of(str(layout), world) for layout in every] == every
        assert [layout.context for layout in every if layout.shard == 1] == [
            size for size in range(1, world + 1) if world % size == 0
        ]


def test_a_split_that_auto_came_to_is_checked_like_one_that_was_named(tiny, tmp_path, monkeypatch, capsys):
    def split(*_given: object) -> plan_room.RunPlan:
        return plan_room.RunPlan(Plan("cpu", "fp32", "auto", "none", shard=2), None, None)

    monkeypatch.setattr(train, "plan_of_run", split)
    path = make_run(tmp_path / "start", tiny, sample={"step_cache": 0.1})
    assert main(["train", "--config", str(path)]) == 1
    assert "step_cache: got 0.1 with engine.parallel shard:2" in " ".join(capsys.readouterr().err.split())


def test_forecasts_know_how_many_processes_talk_and_how_many_of_them_on_this_host(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(plan_room, "_expected", lambda _config, _plan, work, *_: asked.append(work))
    config = load_config(make_run(tmp_path / "start", tiny), [])
    processes = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    plan_room.plan_of_run(config, None, tiny / "transformer", [Bucket(7, 32, 48)], processes, Layout(4))
    resolve = models.resolve_plan
    monkeypatch.setattr(models, "resolve_plan", lambda engine, work, _room: asked.append(work) or resolve(engine, work))
    models.sampling_plan(config)
    assert [(work.world, work.processes) for work in asked] == [(4, 2), (1, 2)]

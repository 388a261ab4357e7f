"""Documentation tables are what the committed results say, and the benchmark itself runs (tiny, on a CPU)."""

import json
import re
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from warm_processes import Place, ended, start

from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError
from mochi_lora.parallel.mesh import Layout
from mochi_lora.planning import footprint
from mochi_lora.planning.cards import card_named
from mochi_lora.planning.resolve import Resolved

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
import encode  # noqa: E402
import encode_lines  # noqa: E402
import fit_plan  # noqa: E402
import kernel_times  # noqa: E402
import predict_scale  # noqa: E402
import result_tables  # noqa: E402
import sample_step  # noqa: E402
import tables  # noqa: E402
import train_step  # noqa: E402
import whole_video  # noqa: E402

USUAL = {
    "benchmark", "gpu", "world_size", "frames", "height", "width", "plan", "memory_cap_gib", "steps", "peak_gib",
    "allocated_gib", "tokens_per_second", "versions",
}  # fmt: skip
SECONDS = {"train_step": "step_seconds", "encode": "clip_seconds"}  # by benchmark, and by file


SMALL = ("--frames", "7", "--height", "32", "--width", "48")


def written(folder: Path, name: str, *words: str, ranks: int = 1) -> list[dict]:
    """The lines that benchmarks/NAME.py writes with these words, in as many processes."""
    output, logs = folder / "lines.jsonl", [folder / f"rank{rank}.log" for rank in range(ranks)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        places = [Place(rank, ranks, probe.getsockname()[1]) for rank in range(ranks)] if ranks > 1 else [None]
    program = ROOT / "benchmarks" / f"{name}.py"
    asked = [*words, "--output", str(output)]
    started = [start(asked, log, place=place, program=program) for log, place in zip(logs, places, strict=True)]
    assert [ended(process) for process in started] == [0] * ranks, "".join(log.read_text() for log in logs)
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow  # the plans of all cards take half a minute
@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_documentation_tables_follow_from_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert tables.filled(text) == text, "out of date: run python benchmarks/tables.py"


def test_a_table_that_was_edited_by_hand_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: plan_errors -->\nby hand\n<!-- end table -->\n")
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check", str(page)])
    assert tables.main() == 1
    assert "out of date" in capsys.readouterr().out


def test_sampling_steps_are_tabled_when_there_are_any_the_newest_of_each_case(tmp_path, monkeypatch):
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    assert tables.table("sample_step") == tables.table("whole_video") == "Not measured yet.\n"
    line = {"sampler": "mochi-lora", "adapter": "attached", "gpu": "H200", "frames": 37, "height": 480, "width": 848,
            "steps": 5, "memory_cap_gib": None,
            "peak_gib": 21.0, "allocated_gib": 20.0, "tokens_per_second": 4e4, "predicted": None,
            "plan": asdict(Plan("cuda", "bf16", "flash4", "none", compile=True))}  # fmt: skip
    seconds = [{"step_seconds": dict.fromkeys(("min", "median", "max"), found)} for found in (0.9, 0.6)]
    parts = {"text": 0.05, "denoising": 322.0, "decoding": 4.2, "writing": 1.5}
    whole = line | {"part_seconds": parts, "step_seconds": {"first": 40.0, "last": 5.01}, "memory_cap_gib": 23.0}
    del whole["tokens_per_second"]
    lines = [line | seconds[0], line | seconds[1], line | seconds[0] | {"adapter": "none"}, whole]
    failed = line | {"error": "OutOfMemoryError: CUDA out of memory"}
    (tmp_path / "sample_step.jsonl").write_text("".join(json.dumps(item) + "\n" for item in [*lines, failed]))
    _, _, first, second = tables.table("sample_step").splitlines()
    assert "| 0.60 (" in first
    assert first.endswith("| attached |")
    assert "| 0.90 (" in second
    assert second.endswith("| none |")
    (video,) = tables.table("whole_video").splitlines()[2:]
    assert video.endswith("| attached | 0.05 | 322.0 (5 steps) | 5.01 | 4.2 | 1.5 | 21.0 |")
    assert "| 23 GiB | 37 at 480x848 |" in video


def test_several_gpus_are_tabled_beside_one(tmp_path, monkeypatch):
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    assert tables.table("scale") == "Not measured yet.\n"
    alone = {"gpu": "H200", "frames": 37, "height": 480, "width": 848, "layers": 48, "mode": "alone", "world_size": 1,
             "plan": asdict(Plan("cuda", "bf16", "cudnn", "attention_saved")), "step_seconds": {"median": 1.25},
             "guided_step_seconds": 0.66, "static_gib": 19.5}  # fmt: skip
    shared = alone | {
        "mode": "shard",
        "world_size": 2,
        "speed_up": 1.99,
        "sampling_speed_up": 1.98,
        "static_share": 0.549,
        "speed_against_data": 0.996,
    }
    lines = [alone, shared, alone | {"layers": 2, "step_seconds": {"median": 0.1}}, shared | {"error": "RuntimeError: NCCL"}]
    (tmp_path / "scale.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    first, second = tables.table("scale").splitlines()[2:]
    assert first.startswith("| 1 x H200 | alone | none | 37 at 480x848 | ")
    assert first.endswith("| 1.25 |  |  | 0.66 |  | 19.5 |  |")
    assert second.endswith("| 1.25 | 1.99x | 0.996 | 0.66 | 1.98x | 19.5 | 54.9% |")


@pytest.mark.slow
def test_scale_measures_every_way_of_sharing_on_two_processes(tmp_path):
    words = [*SMALL, "--layers", "1", "--heads", "2", "--precision", "fp32", "--warmup", "0", "--steps", "1"]
    alone, data, context, shard = written(tmp_path, "scale", *words, ranks=2)
    assert [line["mode"] for line in (alone, data, context, shard)] == ["alone", "data", "context", "shard"]
    assert [line["world_size"] for line in (alone, data, context, shard)] == [1, 2, 2, 2]
    assert not {"speed_up", "speed_against_data"} & alone.keys()
    seconds = [line["step_seconds"]["median"] for line in (alone, data, context, shard)]
    assert data["speed_up"] == pytest.approx(2 * seconds[0] / seconds[1])
    assert context["speed_up"] == pytest.approx(seconds[0] / seconds[2])
    assert shard["speed_against_data"] == pytest.approx(seconds[1] / seconds[3])
    assert context["sampling_speed_up"] == pytest.approx(alone["guided_step_seconds"] / context["guided_step_seconds"])
    assert context["losses"] == pytest.approx(alone["losses"], rel=1e-4), "the same sample"
    assert all(line["memory_cap_gib"] is None for line in (alone, data, context, shard))


def test_what_two_gpus_came_to_stands_beside_its_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    assert predict_scale.outcomes() == ""
    plan = asdict(Plan("cuda", "bf16", "cudnn", "attention_saved", compile=True, context=2))
    line = {"plan": plan, "frames": 163, "world_size": 2, "layers": 48, "speed_up": 1.88, "sampling_speed_up": 1.86}
    others = [line | {"layers": 2}, line | {"world_size": 1}, line | {"plan": plan | {"precision": "fp8"}}]
    (tmp_path / "scale.jsonl").write_text("".join(json.dumps(item) + "\n" for item in [line, *others]))
    one = predict_scale.predicted(163, Layout(2, context=2))
    told = f"{one.times:.2f} and 1.88 times (sampling {one.sampling:.2f} and 1.86) for `context:2` at 163 frames."
    assert (
        predict_scale.outcomes() == f" Two GPUs, from which a call's and a gather's seconds are, predicted and measured: {told}"
    )


def test_a_base_split_over_two_is_predicted_to_rest_in_55_percent():
    """The bar of the task: half of 48 blocks goes; what is outside them, and the adapter, stay."""
    assert predict_scale.static_share(Layout(2, shard=2)) <= 0.55


def test_the_vae_is_tabled_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    assert tables.table("vae") == "Not measured yet.\n"
    plan = {"precision": "bf16", "chunk_elements": 2**28, "cudnn_benchmark": False}
    line = {"what": "decode", "implementation": "mochi-lora", "plan": plan, "gpu": "H200", "frames": 163, "height": 480,
            "width": 848, "memory_cap_gib": None, "channels": None, "peak_gib": 14.2,
            "allocated_gib": 8.4, "difference": 0.0042, "error_from_fp32": None,
            "clip_seconds": {"min": 4.1, "median": 4.2, "max": 4.4}}  # fmt: skip
    folder = line | {
        "what": "folder",
        "film": "1280x720",
        "clips": 24,
        "gpu_busy_share": 0.95,
        "plan": plan | {"read_ahead": 4},
    }
    folder |= {"clip_seconds": dict.fromkeys(("min", "median", "max"), 0.2)}
    text = folder | dict.fromkeys(("frames", "height", "width")) | {"what": "text", "text_width": 4096, "gpu_busy_share": None}
    text |= {"plan": {"precision": "bf16", "text_batch": 8}}
    lines = [
        line,
        line | {"what": "encode", "difference": None},
        line | {"channels": 32},
        line | {"error_from_fp32": 0.016, "clip_seconds": dict.fromkeys(("min", "median", "max"), 9.0)},
        folder,
        text,
        text | {"text_width": 64},
    ]
    (tmp_path / "encode.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    decode, encode = tables.table("vae").splitlines()[2:]
    assert decode.startswith(
        "| decode | mochi-lora, bf16 | H200 | none | 163 at 480x848 | 4.2 (4.1 to 4.4) | 8.4 | 14.2 | 4.2e-03 | 1.6e-02 |"
    ), "the error of a run with --exact, the seconds of one without"
    assert encode.endswith("| 14.2 |  |  |")
    captions, films = tables.table("encoding").splitlines()[2:]
    assert films.startswith("| 24 films of 1280x720, 4 read ahead | H200 | none | 163 at 480x848 | 0.2 | 8.4 | 14.2 | 95% |")
    assert captions.startswith("| captions, 8 at once | H200 | none |  | 0.2 |")


def test_a_card_that_was_measured_shows_it_in_both_languages(monkeypatch):
    monkeypatch.setattr(tables, "cards", lambda: (card_named("H200"),))
    tables._picks.cache_clear()
    english, chinese = (tables.table(name).splitlines() for name in ("cards", "cards_zh"))
    tables._picks.cache_clear()
    assert english[0].startswith("| GPU | Memory | 37 frames (1.2 s) |")
    assert chinese[0].startswith("| GPU | 显存 | 37 帧（1.2 秒） |")
    assert re.match(r"\| H200 \| 140 GiB \| \d\.\d s, \d+ \+ \d+ GiB \|", english[2])
    fastest = min(line["step_seconds"]["median"] for line in result_tables.newest_steps() if line["frames"] == 37)
    assert f"| H200, **measured** | 140 GiB | {fastest:.2f} s, " in english[3]
    assert f"| H200, **实测** | 140 GiB | {fastest:.2f} s, " in chinese[3]


@pytest.mark.slow
def test_the_step_cache_benchmark_holds_every_setting_against_the_exact_sampler(tmp_path):
    words = ["--prompts", "1", "--steps", "6", "--thresholds", "0.2", "--fewer", "3"]
    exact, cached, fewer = written(tmp_path, "step_cache", *words)
    assert (exact["spared"], exact["latent_error"], exact["psnr"]) == (0, 0, None)
    assert 0 < cached["spared"] < 1
    assert fewer["spared"] == 0.5
    assert all(line["latent_error"] > 0 and line["psnr"] < 100 for line in (cached, fewer))


def test_constants_fitted_on_half_of_the_cells_predict_the_others():
    found = fit_plan.cells([RESULTS / name for name in fit_plan.FILES])
    fitted, others = found[::2], found[1::2]
    assert len(others) >= 5
    constants = fit_plan.fit(fitted, replace(footprint.fitted(), kept_eager=40.0, moved_compiled=150.0))
    assert abs(constants.kept_eager - 30) < 4
    for name, memory, seconds in fit_plan.errors(others, constants):
        assert abs(memory) < 0.08, name
        assert abs(seconds) < 0.15, name


def test_the_constants_are_written_where_they_are_read(tmp_path, monkeypatch):
    committed = yaml.safe_load(fit_plan.FITTED.read_text())
    assert committed == asdict(footprint.fitted())
    copy = tmp_path / "fitted.yaml"
    copy.write_text(fit_plan.FITTED.read_text())
    monkeypatch.setattr(fit_plan, "FITTED", copy)
    monkeypatch.setattr("sys.argv", ["fit_plan.py", "--write"])
    fit_plan.main()
    assert yaml.safe_load(copy.read_text()) == pytest.approx(committed, rel=0.2)


def test_a_plan_is_read_from_words_and_a_strange_part_is_refused():
    cpu = torch.device("cpu")
    plan = train_step._plan("precision=fp8,checkpointing=attention_saved:36,none,block_swap=4,compile=true", cpu)
    assert plan == Plan("cpu", "fp8", "auto", "attention_saved:36,none", 4, compile=True)
    assert train_step._plan_of({"compile": False, "block_swap": 2}, cpu) == Plan("cpu", "bf16", "auto", "full", 2)
    with pytest.raises(ValueError, match="swap: no part of a plan; they are device, precision"):
        train_step._plan("swap=4", cpu)
    with pytest.raises(ValueError, match="is not understood"):
        train_step._plan("checkpointing=half", cpu)


def test_time_in_which_a_kernel_runs_counts_once():
    made = [kernel_times.Kernel(begin, end, name) for begin, end, name in ((3 * 10**9, 4 * 10**9, "c"), (0, 10**9, "a"))]
    overlapping = kernel_times.Kernel(5 * 10**8, 2 * 10**9, "b")
    assert kernel_times.busy_seconds([*made, overlapping]) == 3.0
    found = kernel_times.gaps([*made, overlapping]).splitlines()
    assert found[0].split() == ["1000.000", "ms", "in", "all,", "of", "3", "kernels"]
    assert len(found) == 2
    assert found[1].endswith("b -> c")


def test_every_committed_line_has_the_agreed_fields():
    files = [file for name in SECONDS if (file := RESULTS / f"{name}.jsonl").exists()]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert lines
    for line in (line for line in lines if "error" not in line):
        assert line.keys() >= USUAL | {SECONDS[line["benchmark"]]}
        assert line["finite"]


@pytest.mark.slow
def test_the_encode_benchmark_holds_ours_against_diffusers_on_a_small_vae(tmp_path):
    words = ["--frames", "7", "13", "--height", "32", "--width", "48", "--channels", "32", "--precision", "fp32"]
    words += ["--steps", "2", "--chunk", "30000", "--exact", "--what", "encode", "decode"]
    lines = written(tmp_path, "encode", *words)
    cases = [(line["what"], line["implementation"], line["frames"]) for line in lines]
    assert cases == [
        (what, name, frames) for what in ("encode", "decode") for name in ("mochi-lora", "diffusers") for frames in (7, 13)
    ]
    for line in lines:
        assert line.keys() >= USUAL | {"clip_seconds"}
        assert line["finite"]
        assert line["clip_seconds"]["min"] > 0
        assert line["error_from_fp32"] < 1e-5
        assert (line["difference"] or 0) < 1e-5
        assert (line["difference"] is None) == (line["implementation"] == "mochi-lora")


@pytest.mark.slow
def test_the_encode_benchmark_reads_a_folder_of_films_and_embeds_captions(tmp_path):
    words = [*SMALL, "--what", "folder", "text", "--channels", "32", "--films"]
    words += ["160x96", "96x160", "--clips", "5", "--read-ahead", "2", "--text-width", "64", "--text-batch", "2"]
    *films, text = written(tmp_path, "encode", *words)
    for line in (*films, text):
        assert line.keys() >= USUAL | {"clip_seconds", "clips_per_second", "gpu_busy_share"}
        assert line["clips_per_second"] == pytest.approx(1 / line["clip_seconds"]["median"])
    assert [(line["film"], line["steps"], line["plan"]["read_ahead"]) for line in films] == [("160x96", 5, 2), ("96x160", 5, 2)]
    assert all(line["part_seconds"].keys() >= {"probing", "reading", "encoding", "writing"} for line in films)
    assert (text["steps"], text["plan"]["text_batch"]) == (3, 2)


def test_a_case_that_runs_out_of_memory_is_a_line_and_ours_runs_before_the_yardstick(monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    assert encode_lines.measured({"what": "encode"}, full) == {
        "what": "encode",
        "error": "OutOfMemoryError: CUDA out of memory.",
    }
    monkeypatch.setattr(sys, "argv", ["encode.py", "--memory-cap-gib", "23"])
    assert encode._arguments().implementation == ["mochi-lora", "diffusers"]


@pytest.mark.parametrize(("benchmark", "told"), [(train_step, "trainer"), (sample_step, "sampler")])
def test_a_model_that_does_not_fit_is_a_line_for_each_of_its_cases_and_the_next_one_runs(
    tmp_path, monkeypatch, benchmark, told
):
    def made(*_, precision, **__):
        if precision == "fp8":
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return torch.nn.Module()

    monkeypatch.setattr(train_step, "random_transformer", made)
    monkeypatch.setattr(train_step, "attach", lambda *_: {})
    monkeypatch.setattr(train_step.Bench, "_measured", lambda *_: {"losses": [1.0]})
    plans = ["--plan", "precision=fp8", "--plan", "precision=bf16"]
    found = run_cases(tmp_path, monkeypatch, benchmark, "--frames", "7", "13", *plans)
    assert {line["benchmark"] for line in found} == {benchmark.__name__}
    failed, ran = ([line for line in found if line["plan"]["precision"] == name] for name in ("fp8", "bf16"))
    assert {line["frames"] for line in failed} == {line["frames"] for line in ran} == {7, 13}
    assert all(line["error"] == "OutOfMemoryError: CUDA out of memory." for line in failed)
    assert all("error" not in line and line[told] == "mochi-lora" for line in ran)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("8.0 GiB of host memory could not be page-locked; lower it"), "UserError: 8.0 GiB of host memory could"),
        (RuntimeError(), "RuntimeError: "),
    ],
)
def test_a_case_that_fails_is_a_line_and_its_model_runs_the_next(tmp_path, monkeypatch, error, told):
    """A swap that was refused leaves no half-made model behind: the one before it is made anew."""
    made = []

    def model(transformer, plan):
        made.append(plan.attention)
        if plan.attention == "math":
            raise error
        return SimpleNamespace(plan=plan)

    monkeypatch.setattr(train_step, "random_transformer", lambda *_, **__: torch.nn.Module())
    monkeypatch.setattr(train_step, "attach", lambda *_: {})
    monkeypatch.setattr(train_step, "VelocityModel", model)
    monkeypatch.setattr(train_step, "random_steps", lambda *_: iter(()))
    monkeypatch.setattr(train_step, "run_trial", lambda *_: None)
    monkeypatch.setattr(train_step, "figures", lambda *_: {"steps": 10})
    plans = [word for name in ("auto", "math", "auto") for word in ("--plan", f"attention={name}")]
    before, failed, after = run_cases(tmp_path, monkeypatch, train_step, *plans)
    assert failed["error"].startswith(told)
    assert before["steps"] == after["steps"] == 10
    assert made == ["auto", "math", "auto"]


def run_cases(folder: Path, monkeypatch, benchmark, *words: str) -> list[dict]:
    """The lines of train_step.py or sample_step.py with these words, made in this process."""
    output = folder / "lines.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["benchmark", *SMALL[2:], *words, "--layers", "1", "--heads", "2", "--output", str(output)]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "expand_segments", lambda: None)
    benchmark.main()
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
def test_the_step_benchmark_runs_both_trainers_on_a_small_model(tmp_path):
    words = [*SMALL, "--layers", "2", "--heads", "6", "--steps", "2", "--warmup", "1"]
    words += ["--stock", "--plan", "precision=fp32,checkpointing=none"]
    lines = written(tmp_path, "train_step", *words, "--plan", "precision=fp8,checkpointing=full:1,offload,block_swap=1")
    assert [line["trainer"] for line in lines] == ["mochi-lora", "mochi-lora", "diffusers"]
    assert [line["plan"]["block_swap"] for line in lines] == [0, 1, 0]
    assert all(line["finite"] and line["step_seconds"]["median"] > 0 for line in lines)


@pytest.mark.slow
def test_the_sampling_benchmark_makes_the_same_step_in_every_form(tmp_path):
    """One pass or two, adapter beside the weights or in them, swapped or not, by diffusers: B is zero, so all agree."""
    words = [*SMALL, "--layers", "2", "--heads", "2", "--steps", "1", "--warmup", "1"]
    words += ["--stock", "--adapter", "attached", "fused", "none", "--plan", "precision=fp32,checkpointing=none"]
    lines = written(tmp_path, "sample_step", *words, "--plan", "precision=fp32,block_swap=1")
    forms = [(line["sampler"], line["plan"]["block_swap"], line["adapter"], line["plan"]["guidance_passes"]) for line in lines]
    ours = [("mochi-lora", swap, adapter, passes) for swap in (0, 1) for adapter in ("attached", "fused", "none")
            for passes in ("two", "one")]  # fmt: skip
    assert sorted(forms) == sorted([*ours, ("diffusers", 0, "attached", "one")])
    *sizes, stock = (line["latents_mean_square"] for line in sorted(lines, key=lambda line: line["sampler"] == "diffusers"))
    assert max(sizes) - min(sizes) < 3e-6 * max(sizes)
    assert stock == pytest.approx(sizes[0], rel=5e-5)  # it computes positions and the noise level otherwise
    assert all(line["finite"] and line["step_seconds"]["min"] > 0 for line in lines)


@pytest.mark.slow
def test_the_sampling_benchmark_makes_a_whole_video_of_a_small_model(tmp_path):
    words = [*SMALL, "--layers", "2", "--heads", "2", "--steps", "2", "--whole"]
    words += ["--channels", "32", "--text-width", "128", "--adapter", "attached", "none"]
    lines = written(tmp_path, "sample_step", *words, "--plan", "precision=fp32,checkpointing=none,guidance_passes=one")
    assert [line["adapter"] for line in lines] == ["attached", "none"]
    for line in lines:
        assert line.get("error") is None
        assert line["part_seconds"].keys() == {"text", "denoising", "decoding", "writing"}
        assert (line["plan"]["guidance_passes"], line["plan_chosen"]) == ("one", False)
        assert line["finite"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter", "fused"], "give attached or none"),
        (["--guidance", "one_batch"], "guidance_passes=one"),
        (["--stock"], "they are for single steps"),
    ],
)
def test_a_whole_video_refuses_what_it_would_not_do(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["sample_step.py", "--whole", *words])
    with pytest.raises(SystemExit):
        sample_step.parsed()
    assert said in capsys.readouterr().err


def test_without_a_plan_a_whole_video_takes_the_one_that_the_engine_chooses(monkeypatch):
    """And the random T5 is as wide as it is asked to be, its embeddings finite and gone back to the host."""
    asked = []
    monkeypatch.setattr(whole_video, "_filmed", lambda *_: {})
    monkeypatch.setattr(
        whole_video,
        "resolve_plan",
        lambda engine, work: asked.append(work) or Resolved(Plan("cpu", "fp32", "auto", "none"), None),
    )
    monkeypatch.setattr(sys, "argv", ["sample_step.py", "--whole", "--frames", "7", "--layers", "2", "--adapter", "none"])
    (line,) = whole_video.lines(sample_step.parsed(), torch.device("cpu"))
    assert (line["plan_chosen"], line["plan"]["precision"]) == (True, "fp32")
    assert asked[0].films.bucket.frames == 7
    prompt, null, _ = whole_video._embedded(128, torch.device("cpu"))
    assert (prompt.tokens.shape, null.tokens.shape) == ((120, 128), (0, 128))
    assert prompt.tokens.isfinite().all()

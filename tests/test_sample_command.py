"""`mochi-lora sample`: what was asked for, and beside each video all that made it."""

import hashlib
import json
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from tiny_commands import frames_of, settings

from mochi_lora import __version__
from mochi_lora.cli import main
from mochi_lora.config.engine import EngineConfig
from mochi_lora.config.schema import AdapterConfig
from mochi_lora.engine.plan import Plan
from mochi_lora.files import sha256_of_file
from mochi_lora.inference import live, shots
from mochi_lora.inference.video import write_mp4
from mochi_lora.model.adapter import attach, current
from mochi_lora.model.adapter_file import save_adapter
from mochi_lora.model.base import fingerprint
from mochi_lora.model.weights import load_transformer
from mochi_lora.planning.cards import card_named
from mochi_lora.planning.choice import Room, choose
from mochi_lora.planning.resolve import Resolved
from mochi_lora.planning.workload import Films, ModelSize, Workload
from mochi_lora.runs import videos as room
from mochi_lora.spec import Bucket

FOX, BALL = "a fox in the snow", "a red ball"


@pytest.fixture
def words(tiny, tmp_path):
    """Words after `sample`; the run folder does not exist."""
    return [*settings(tiny, tmp_path / "clips", tmp_path / "cache"), "--run.folder", str(tmp_path / "run")]


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Two adapter files with random factors, strong enough to be seen."""
    folder, paths = tmp_path_factory.mktemp("adapters"), []
    for seed, name in ((1, "style"), (2, "motion")):
        transformer = load_transformer(tiny / "transformer", device=torch.device("cpu"), precision="fp32").transformer
        draw = torch.Generator().manual_seed(seed)
        for key, parameter in attach(transformer, AdapterConfig(rank=4, alpha=8), seed).items():
            if ".lora_B." in key:
                parameter.data.normal_(0, 0.5, generator=draw)
        paths.append(folder / f"{name}.safetensors")
        save_adapter(paths[-1], current(transformer), {"step": 1})
    return paths


@pytest.fixture
def sample(words, tmp_path, monkeypatch):
    """Runs `sample` for one prompt and seed (unless told others); returns {video name: (frames, JSON)}.

    Frames as handed to the video encoder: x264 itself does not always make the same bytes of the same frames.
    """
    calls, written = iter(range(99)), {}
    monkeypatch.setattr(shots, "write_mp4", lambda path, frames: (written.update({path: frames}), write_mp4(path, frames)))

    def run(*more):
        output = tmp_path / f"out{next(calls)}"
        asked = [] if {"--prompt", "--prompts"} & set(more) else ["--prompt", FOX]
        assert main(["sample", *words, *asked, *map(str, more), "--output", str(output)]) == 0
        assert (output / "sheet.png").exists()
        videos = {path.name: path for path in sorted(output.glob("*.mp4"))}
        assert len(list(output.iterdir())) == 2 * len(videos) + 1  # nothing left over
        assert all(frames_of(path).shape == written[path].shape for path in videos.values())
        return {name: (written[path], json.loads(path.with_suffix(".json").read_text())) for name, path in videos.items()}

    return run


def _frames(made):
    ((frames, _),) = made.values()
    return frames


def _differ(first, second):
    return np.abs(first.astype(int) - second.astype(int)).mean() > 1


def test_the_base_alone_makes_the_video_of_its_prompt_and_seed(sample):
    made = sample("--base-only")
    assert list(made) == ["000-a-fox-in-the-snow-seed0.mp4"]
    assert _frames(made).shape == (7, 32, 48, 3)
    assert np.array_equal(_frames(sample("--base-only")), _frames(made))
    assert _differ(_frames(sample("--base-only", "--seed", 1)), _frames(made))
    assert _differ(_frames(sample("--base-only", "--prompt", BALL)), _frames(made))


def test_an_adapter_of_strength_zero_is_the_base_exactly(sample, adapters):
    base = _frames(sample("--base-only"))
    assert np.array_equal(_frames(sample("--adapter", f"{adapters[0]}:0")), base)
    assert np.array_equal(_frames(sample("--adapter", f"{adapters[0]}:0", f"{adapters[1]}:0")), base)
    assert _differ(_frames(sample("--adapter", adapters[0])), base)


def test_several_adapters_act_together_each_at_its_strength(sample, adapters):
    style, motion = adapters
    both = _frames(sample("--adapter", f"{style}:0.5", f"{motion}:0.8"))
    assert _differ(both, _frames(sample("--adapter", f"{style}:0.5")))
    assert _differ(both, _frames(sample("--adapter", f"{motion}:0.8")))
    assert _differ(both, _frames(sample("--adapter", f"{style}:0.8", f"{motion}:0.5")))
    turned = _frames(sample("--adapter", f"{motion}:0.8", f"{style}:0.5"))
    assert np.abs(turned.astype(int) - both).mean() < 0.01  # sums in another order
    only_motion = _frames(sample("--adapter", f"{style}:0", motion))
    assert np.array_equal(only_motion, _frames(sample("--adapter", motion)))


def test_the_json_beside_a_video_says_all_that_made_it(sample, adapters, tiny, tmp_path):
    made = sample("--adapter", f"{adapters[0]}:0.5", adapters[1], "--seed", 7, "--sample.guidance", "[3, 1.5]")
    ((name, (frames, about)),) = made.items()
    assert about.pop("frames_sha256") == hashlib.sha256(frames.tobytes()).hexdigest()
    assert about.pop("video_sha256") == sha256_of_file(tmp_path / "out0" / name)
    assert about == {
        "prompt": FOX,
        "seed": 7,
        "adapters": [
            {"path": str(path), "strength": strength, "sha256": sha256_of_file(path)}
            for path, strength in zip(adapters, (0.5, 1.0), strict=True)
        ],
        "base": str(tiny),
        "base_revision": None,
        "base_fingerprint": fingerprint(tiny / "transformer"),
        "vae_fingerprint": fingerprint(tiny / "vae"),
        "text_fingerprint": fingerprint(tiny / "text_encoder"),
        "text_precision": "fp32",
        "plan": {
            "device": "cpu",
            "precision": "fp32",
            "attention": "auto",
            "checkpointing": "none",
            "block_swap": 0,
            "compile": False,
            "context": 1,
            "shard": 1,
            "cpu_offload": False,
            "guidance_passes": "two",
        },
        "negative_prompt": "",
        "frames": 7,
        "height": 32,
        "width": 48,
        "steps": 2,
        "guidance": [3.0, 1.5],
        "guidance_interval": [0.0, 1.0],
        "step_cache": 0.0,
        "threshold_noise": 0.025,
        "linear_steps": None,
        "versions": {"mochi_lora": __version__}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }


def test_a_run_uses_its_own_adapter_at_the_configured_strength(sample, adapters, tmp_path):
    (tmp_path / "run").mkdir()
    own = tmp_path / "run" / "adapter.safetensors"
    own.write_bytes(adapters[0].read_bytes())
    made = sample("--sample.strength", 0.5)
    ((_, about),) = made.values()
    assert about["adapters"] == [{"path": str(own), "strength": 0.5, "sha256": sha256_of_file(adapters[0])}]
    assert np.array_equal(_frames(made), _frames(sample("--adapter", f"{adapters[0]}:0.5")))


def test_prompts_and_seeds_of_the_configuration_are_all_combined(sample, words):
    made = sample("--base-only", "--prompt", FOX, BALL, "--seed", 0, 5)
    expected = [(FOX, 0), (FOX, 5), (BALL, 0), (BALL, 5)]
    assert [(about["prompt"], about["seed"]) for _, about in made.values()] == expected
    alone = _frames(sample("--base-only", "--prompt", BALL, "--seed", 5))
    assert np.array_equal(made["003-a-red-ball-seed5.mp4"][0], alone)  # not changed by what was made before it


def test_without_a_prompt_those_of_the_configuration_are_made(words, tmp_path):
    assert main(["sample", *words, "--base-only", "--output", str(tmp_path / "out")]) == 0
    found = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert found == ["000-a-fox-in-the-snow-seed0.mp4", "001-a-red-ball-seed0.mp4"]


def test_without_output_the_videos_lie_in_the_run_folder(words, tmp_path):
    assert main(["sample", *words, "--base-only"]) == 0
    assert len(list((tmp_path / "run" / "samples").glob("sample-*/*.mp4"))) == 2


def test_a_text_file_has_one_prompt_a_line(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{FOX}\n\n  {BALL} \n")
    made = sample("--base-only", "--prompts", tmp_path / "prompts.txt", "--seed", 2)
    assert [(about["prompt"], about["seed"]) for _, about in made.values()] == [(FOX, 2), (BALL, 2)]


def test_a_jsonl_file_may_fix_the_seed_of_a_prompt(sample, tmp_path):
    lines = [{"prompt": FOX, "seed": 9}, {"prompt": BALL}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = sample("--base-only", "--prompts", tmp_path / "prompts.jsonl", "--seed", 2, 3)
    assert [(about["prompt"], about["seed"]) for _, about in made.values()] == [(FOX, 9), (BALL, 2), (BALL, 3)]


def test_the_negative_prompt_changes_what_guidance_moves_away_from(sample):
    plain = _frames(sample("--base-only"))
    assert _differ(_frames(sample("--base-only", "--sample.negative_prompt", "a lighthouse on a cliff")), plain)
    unguided = _frames(sample("--base-only", "--sample.guidance", 1))
    ignored = sample("--base-only", "--sample.guidance", 1, "--sample.negative_prompt", "a lighthouse on a cliff")
    assert np.array_equal(_frames(ignored), unguided)


def test_settings_of_memory_do_not_change_the_video(sample, adapters):
    plain = _frames(sample("--adapter", adapters[0]))
    assert np.array_equal(_frames(sample("--adapter", adapters[0], "--engine.cpu_offload", "true")), plain)
    assert np.array_equal(_frames(sample("--adapter", adapters[0], "--engine.checkpointing", "full")), plain)


@pytest.mark.parametrize("where", ["load_sampler", "_film"])
def test_a_gpu_that_is_full_is_told_with_the_plan_of_the_videos_and_the_next_smaller(
    words, tmp_path, capsys, monkeypatch, where
):
    """No GPU here: the plan is told as on one, and the weights or the steps find no room."""
    films = Films(Bucket(37, 480, 848), 64, guided=True, decoding_gib=8.0)
    work = Workload(ModelSize.of({}), films.bucket, 1, 1, None, films)
    choice = choose(EngineConfig(), work, card_named("H200"), Room(139.0, 64.0), "cudnn")

    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(room, "sampling_plan", lambda *_, **__: Resolved(Plan("cpu", "fp32", "auto", "none"), choice))
    monkeypatch.setattr(room, where, full)
    assert main(["sample", *words, "--base-only", "--prompt", FOX, "--output", str(tmp_path / "out")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"the GPU's memory is full (CUDA out of memory.). The plan was {choice.pick.plan}: predicted were" in told
    assert f"set, below engine, {choice.smaller.plan}" in told


def test_a_prompt_cut_at_256_tokens_is_named_brackets_included(sample, capsys):
    sample("--base-only", "--prompt", "a [bold] fox [/x] " * 60)
    assert "cut at 256 tokens: a [bold] fox [/x] a [bold]" in capsys.readouterr().out


def _refused(words, output, *more):
    status = main(["sample", *words, *map(str, more), "--output", str(output)])
    assert not output.exists(), "a refused command leaves nothing"
    return status


def test_a_prompt_t5_knows_nothing_of_is_refused(words, tmp_path, capsys):
    assert _refused(words, tmp_path / "out", "--base-only", "--prompt", FOX, "一只兔子") == 1
    assert "prompt '一只兔子': every token is unknown to T5 (it knows English)" in capsys.readouterr().err


def test_a_run_without_adapter_says_what_to_do(words, tmp_path, capsys):
    assert _refused(words, tmp_path / "out", "--prompt", FOX) == 1
    told = capsys.readouterr().err
    assert f"error: {tmp_path / 'run' / 'adapter.safetensors'}: this run has no finished adapter yet" in told
    assert "--base-only" in told


def test_an_adapter_that_cannot_be_used_is_named(words, tmp_path, capsys, adapters):
    missing, cut, text = tmp_path / "none.safetensors", tmp_path / "cut.safetensors", tmp_path / "text.safetensors"
    cut.write_bytes(adapters[0].read_bytes()[:-7])
    text.write_text("not an adapter")
    for path, reason in (
        (missing, "no such adapter file"),
        (cut, "not a readable safetensors file"),
        (text, "not a readable safetensors file"),
    ):
        assert _refused(words, tmp_path / "out", "--prompt", FOX, "--adapter", adapters[0], path) == 1
        assert f"error: {path}: {reason}" in capsys.readouterr().err


def test_no_prompt_at_all_is_said(words, tmp_path, capsys):
    assert _refused(words, tmp_path / "out", "--base-only", "--sample.prompts", "[]") == 1
    assert "no prompt: give --prompt, --prompts FILE, or sample.prompts" in capsys.readouterr().err


def test_a_base_model_without_a_part_is_named(words, tmp_path, capsys, tiny):
    half = tmp_path / "half"
    half.mkdir()
    for missing in ("has no folder transformer", "no readable config.json", "has no folder text_encoder"):
        assert _refused(words, tmp_path / "out", "--base-only", "--model.base", half) == 1
        told = capsys.readouterr().err
        assert str(half) in told
        assert missing in told
        if missing.startswith("has"):
            (half / "transformer").mkdir(exist_ok=True)
        else:
            shutil.copy(tiny / "transformer" / "config.json", half / "transformer")


def test_ctrl_c_keeps_finished_videos(words, tmp_path, monkeypatch):
    make, made = live.generate_latents, []

    def once(*args, **options):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return make(*args, **options)

    monkeypatch.setattr(live, "generate_latents", once)
    assert main(["sample", *words, "--base-only", "--output", str(tmp_path / "out")]) == 130
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000-a-fox-in-the-snow-seed0.json", "000-a-fox-in-the-snow-seed0.mp4"]


# --- resuming, sweeps and grids -----------------------------------------------------------------------------------------


@pytest.fixture
def sweep(words, tmp_path, monkeypatch, sample):
    """Runs `sample` into one folder; returns ({video name: frames made now}, {video name: JSON} of all there)."""
    made, output = {}, tmp_path / "sweep"
    write = shots.write_mp4  # the other fixture's, which keeps its own frames
    monkeypatch.setattr(shots, "write_mp4", lambda path, frames: (made.update({path.name: frames}), write(path, frames)))

    def run(*more):
        made.clear()
        assert main(["sample", *words, *map(str, more), "--output", str(output)]) == 0
        grids = {"grid.mp4"} if "--grid" in more else set()
        videos = sorted(path for path in output.glob("*.mp4") if path.name not in grids)
        return dict(made), {path.name: json.loads(path.with_suffix(".json").read_text()) for path in videos}

    run.output = output
    return run


def test_the_same_call_again_makes_only_what_is_missing(sweep, monkeypatch, capsys):
    first, _ = sweep("--base-only", "--prompt", FOX, BALL)
    (sweep.output / "001-a-red-ball-seed0.mp4").unlink()
    again, there = sweep("--base-only", "--prompt", FOX, BALL)
    assert "1 of 2 are there already" in capsys.readouterr().out
    assert list(again) == ["001-a-red-ball-seed0.mp4"]
    assert np.array_equal(again["001-a-red-ball-seed0.mp4"], first["001-a-red-ball-seed0.mp4"])
    assert len(there) == 2
    monkeypatch.setattr(room, "load_sampler", None)  # calling it would fail: nothing is left to make
    monkeypatch.setattr(room, "load_text", None)
    assert sweep("--base-only", "--prompt", FOX, BALL)[0] == {}


def test_another_setting_or_adapter_makes_the_videos_anew(sweep, adapters, tmp_path):
    own = tmp_path / "own.safetensors"
    own.write_bytes(adapters[0].read_bytes())
    assert len(sweep("--adapter", own, "--prompt", FOX)[0]) == 1
    assert len(sweep("--adapter", own, "--prompt", FOX, "--sample.guidance", 2)[0]) == 1
    own.write_bytes(adapters[1].read_bytes())
    assert len(sweep("--adapter", own, "--prompt", FOX, "--sample.guidance", 2)[0]) == 1
    assert len(sweep("--adapter", f"{own}:0.5", "--prompt", FOX, "--sample.guidance", 2)[0]) == 1
    assert len(sweep("--adapter", f"{own}:0.5", "--prompt", FOX, "--sample.guidance", 2)[0]) == 0


def test_strengths_are_columns_and_zero_is_the_base_bit_for_bit(sweep, sample, adapters):
    made, about = sweep("--adapter", adapters[0], "--strengths", 0, 0.5, 1, "--prompt", FOX)
    names = [f"000-a-fox-in-the-snow-seed0-style-{strength}.mp4" for strength in ("0", "0.5", "1")]
    assert [about[name]["adapters"][0]["strength"] for name in names] == [0, 0.5, 1]
    zero, half, one = (made[name] for name in names)
    ((base, base_about),) = sample("--base-only").values()
    assert np.array_equal(zero, base)
    assert about[names[0]]["frames_sha256"] == base_about["frames_sha256"]
    assert np.array_equal(half, _frames(sample("--adapter", f"{adapters[0]}:0.5")))
    assert np.array_equal(one, _frames(sample("--adapter", adapters[0])))


def test_a_sweep_takes_the_adapters_one_by_one_and_leaves_none_behind(sweep, sample, adapters):
    """Each has its turn on one transformer: what was on it before must not be felt."""
    made, about = sweep("--sweep", "--adapter", *adapters, "--strengths", 1, 0.5, "--prompt", FOX)
    assert len(made) == 4
    for adapter, name in zip(adapters, ("style", "motion"), strict=True):
        alone = _frames(sample("--adapter", f"{adapter}:0.5"))
        assert np.array_equal(made[f"000-a-fox-in-the-snow-seed0-{name}-0.5.mp4"], alone)
        assert [item["path"] for item in about[f"000-a-fox-in-the-snow-seed0-{name}-1.mp4"]["adapters"]] == [str(adapter)]


def test_adapters_of_one_file_name_are_told_apart_by_their_folders(sweep, adapters, tmp_path):
    paths = [tmp_path / folder / "adapter.safetensors" for folder in ("one", "two")]
    for path, source in zip(paths, adapters, strict=True):
        path.parent.mkdir()
        shutil.copy(source, path)
    _, about = sweep("--sweep", "--adapter", *paths, "--prompt", FOX)
    assert list(about) == [f"000-a-fox-in-the-snow-seed0-{name}-adapter-1.mp4" for name in ("one", "two")]


def test_a_grid_has_a_row_per_prompt_and_a_column_per_strength(sweep, adapters, capsys):
    sweep("--adapter", adapters[0], "--strengths", 0, 1, "--prompt", FOX, BALL, "--grid")
    frames = frames_of(sweep.output / "grid.mp4")
    assert frames.shape == (7, 24 + 2 * (24 + 128 + 4), 4 + 2 * (192 + 4), 3)
    assert f"grid     {sweep.output / 'grid.mp4'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--base-only", "--strengths", "0", "1"], "--strengths and --sweep need an adapter"),
        (["--adapter", "a.safetensors", "--sweep"], "give --adapter two or more"),
        (["--adapter", "a.safetensors:0.5", "--strengths", "1"], "write --adapter PATH, without :STRENGTH"),
    ],
)
def test_a_sweep_of_nothing_is_refused(words, tmp_path, capsys, asked, told):
    assert _refused(words, tmp_path / "out", "--prompt", FOX, *asked) == 1
    assert told in capsys.readouterr().err

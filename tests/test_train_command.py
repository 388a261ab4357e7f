"""`mochi-lora train`, in process: what it leaves behind, what it refuses, and what going on may change."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from inputs import hash_of_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic import SMALL, distance, latents_name, make_run, posterior, records, same_tensors

from mochi_lora.cli import main
from mochi_lora.config.load import load_config
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import read_index, write_index
from mochi_lora.data.samples import Posterior
from mochi_lora.files import only_one
from mochi_lora.model.adapter_file import load_adapter, read_provenance
from mochi_lora.runs.events import RunEvents
from mochi_lora.runs.previews import Previews


def train(path: Path, *words: str) -> int:
    return main(["train", "--config", str(path), *words])


def run_of(path: Path) -> Path:
    return path.parent / "run"


def refused(capsys, path: Path, *words: str) -> str:
    """The error of a run that must not start, on one line."""
    capsys.readouterr()
    status = train(path, *words)
    told = capsys.readouterr().err
    assert status == 1, told
    assert "Traceback" not in told
    return " ".join(told.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A run of 3 steps with everything on; tests copy it before they touch it."""
    path = make_run(
        tmp_path_factory.mktemp("finished"),
        tiny,
        train={"steps": 3, "ema_decay": 0.5, "validate_every": 1, "keep_checkpoints": 5, "sample_every": 2},
    )
    assert train(path) == 0
    return path


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run, somewhere else."""
    path = tmp_path / "run.yaml"
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    path.write_text(finished.read_text().replace(str(finished.parent), str(tmp_path)))
    config = load_config(path, [])
    write_index(config.data, read_index(load_config(finished, []).data))  # its name depends on the folder of clips
    return path


# What a run leaves behind


def test_a_run_leaves_every_adapter_the_best_the_last_states_and_its_configuration(finished):
    run = run_of(finished)
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    videos = {path for path in found if path.endswith(".mp4")}
    states = {f"checkpoints/step-00000{step}" for step in (0, 2, 3)}
    assert {str(path.relative_to(run)) for path in (run / "checkpoints").iterdir()} == states
    assert {path for path in found if not path.startswith("checkpoints/")} - videos == {
        "adapter.safetensors",
        "adapters/best.safetensors",
        "adapters/step-000002.safetensors",
        "adapters/step-000003.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "publish/README.md",
        "publish/comfyui/run.safetensors",
        "publish/pytorch_lora_weights.safetensors",
        "samples/step-000000/sheet.png",
        "samples/step-000002/sheet.png",
        "samples/step-000003/sheet.png",
    }
    assert {path for path in videos if path.startswith("publish/")} == {
        f"publish/videos/{side}-1.mp4" for side in ("adapter", "base")
    }
    assert len(videos) == 3 + 2


def test_the_last_step_is_saved_even_where_nothing_was_due(finished):
    run = run_of(finished)
    assert same_tensors(run / "adapter.safetensors", run / "adapters" / "step-000003.safetensors")
    assert read_provenance(run / "adapter.safetensors")["step"] == 3
    assert [line["step"] for line in records(run)] == [1, 2, 3]
    assert [line["step"] for line in records(run, "heldout")] == [0, 1, 2, 3]
    assert [line["step"] for line in records(run, "sample")] == [0, 2, 3]


def test_the_adapter_is_the_moving_average_and_the_state_holds_both(finished):
    run = run_of(finished)
    exported = load_file(run / "adapter.safetensors")
    state = run / "checkpoints" / "step-000003"
    raw, shadow = (load_file(state / f"{name}.safetensors") for name in ("adapter", "ema"))
    for key, tensor in exported.items():
        stem, factor = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
        name = f"{stem}.{factor}.default.weight"
        assert torch.equal(tensor, shadow[name])
        if factor == "lora_B":
            assert not torch.equal(tensor, raw[name])


def test_the_best_adapter_is_the_one_with_the_lowest_held_out_loss(finished):
    run = run_of(finished)
    losses = {line["step"]: line["heldout/loss"] for line in records(run, "heldout")}
    best = read_provenance(run / "adapters" / "best.safetensors")
    assert best["step"] == min((1, 2, 3), key=losses.get)
    assert best["held_out_loss"] == losses[best["step"]]


def test_the_adapter_says_where_it_came_from(finished):
    told = read_provenance(run_of(finished) / "adapter.safetensors")
    config = load_config(finished, [])
    assert told["config"] == config.model_dump(mode="json")
    assert told["base"] == config.model.base
    assert told["average"] is True
    assert told["base_rounded_tensors"] == 0
    assert len(told["base_fingerprint"]) == 16


def test_the_configuration_left_behind_starts_the_same_run(finished):
    assert load_config(run_of(finished) / "config.yaml", []) == load_config(finished, [])


def test_a_checkpoint_holds_no_base_weights(finished, tiny):
    state = run_of(finished) / "checkpoints" / "step-000003"
    assert {path.name for path in state.iterdir()} == {
        *("adapter.safetensors", "ema.safetensors", "optimizer.pt", "progress.json", "manifest.json")
    }
    assert all(".lora_" in name for name in load_file(state / "adapter.safetensors"))
    size = sum(path.stat().st_size for path in state.iterdir())
    adapter = (state / "adapter.safetensors").stat().st_size
    assert size < 5 * adapter, "weights, their average, and two moments"


def test_sampling_leaves_no_trace_in_the_run(tmp_path, tiny, monkeypatch):
    seen = []
    sample = RunEvents.sample

    def watched(self, done):
        before = state_of(self._model)
        sample(self, done)
        seen.append(before == state_of(self._model))

    def state_of(model) -> tuple:
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        modes = [module.training for module in model.modules()]
        grads = [(name, parameter.requires_grad, parameter.data_ptr()) for name, parameter in model.named_parameters()]
        return hash_of_base(model), hooks, modes, grads, torch.random.get_rng_state().tolist()

    monkeypatch.setattr(RunEvents, "sample", watched)
    settings = {"adapter": {"dropout": 0.2}, "train": {"ema_decay": 0.5}}
    plain = make_run(tmp_path / "plain", tiny, **settings)
    sampled = make_run(tmp_path / "sampled", tiny, **settings)
    assert train(plain) == 0
    assert train(sampled, "--train.sample_every", "2", "--train.validate_every", "2") == 0
    assert seen == [True] * 4
    assert records(run_of(plain)) == records(run_of(sampled))
    assert same_tensors(*(run_of(path) / "adapter.safetensors" for path in (plain, sampled)))


# Going on


def test_a_finished_run_says_so_and_changes_nothing(copy, capsys):
    before = {path: path.read_bytes() for path in run_of(copy).rglob("*") if path.is_file()}
    assert train(copy) == 0
    assert "finished at step 3; raise train.steps to go on, or use --fresh" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run_of(copy).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--run.seed", "8"], "run.seed: the run has 7, now 8"),
        (["--adapter.rank", "8"], "adapter.rank: the run has 4, now 8"),
        (["--adapter.targets", "visual_attention"], "adapter.targets: the run has 'joint_attention', now 'visual_attention'"),
        (["--objective.sigma", "stratified"], "objective.sigma: the run has 'uniform', now 'stratified'"),
        (["--train.batch_size", "2"], "samples per step (batch_size x gradient_accumulation x data ranks): the run has 1, now"),
        (["--train.optimizer", "adamw8bit"], "train.optimizer: the run has 'adamw', now 'adamw8bit'"),
        (["--train.ema_decay", "0"], "train.ema_decay: the run has 0.5, now 0.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("steps", ["3", "4"])
def test_what_makes_it_another_run_is_refused_and_only_that_is_listed(finished, capsys, words, field, steps):
    """A finished one too: "finished" would be a lie about the run that was asked for."""
    told = refused(capsys, finished, *words, "--train.steps", steps)
    assert field in told
    assert told.count("the run has") == 1
    assert "choose another run.folder, or start over with --fresh" in told


def test_another_data_set_or_base_is_refused_and_all_differences_are_listed_at_once(copy, tiny, capsys, tmp_path):
    config = load_config(copy, [])
    index = read_index(config.data)
    write_index(config.data, type(index)(**{**vars(index), "entries": index.entries[1:]}))
    base = shutil.copytree(tiny, tmp_path / "base")
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    told = refused(capsys, copy, "--model.base", str(base), "--train.steps", "9")
    assert "encoded data: the run has" in told
    assert "base model fingerprint: the run has" in told
    assert told.count("the run has") == 2


def test_steps_rates_logging_and_loading_may_change(copy, capsys):
    words = ["--train.steps", "5", "--train.learning_rate", "5e-4", "--train.log_every", "2", "--train.sample_every", "0"]
    assert train(copy, *words, "--train.checkpoint_every", "1", "--data.loader_workers", "1") == 0
    assert "continuing at step 3" in capsys.readouterr().out
    assert [line["step"] for line in records(run_of(copy))] == [1, 2, 3, 4, 5]
    assert read_provenance(run_of(copy) / "adapter.safetensors")["step"] == 5


@pytest.mark.parametrize("change", ["weight_decay", "epsilon"])
def test_an_optimiser_setting_changed_on_the_way_is_obeyed(copy, tmp_path, change):
    """A checkpoint stores torch's parameter groups; loading them whole would silently bring the old settings back."""
    shutil.copytree(run_of(copy), tmp_path / "other")
    words = ["--train.steps", "5", "--train.sample_every", "0"]
    assert train(copy, *words) == 0
    assert train(copy, *words, "--run.folder", str(tmp_path / "other"), f"--train.{change}", "0.5") == 0
    assert not same_tensors(run_of(copy) / "adapter.safetensors", tmp_path / "other" / "adapter.safetensors")


def test_a_changed_engine_is_said_aloud_and_a_changed_preview_is_not(copy, capsys):
    words = ["--train.steps", "4", "--train.sample_every", "0"]
    assert train(copy, *words, "--engine.cpu_offload", "true") == 0
    assert "no longer bit for bit" not in capsys.readouterr().out
    words[1] = "5"
    assert train(copy, *words, "--engine.checkpointing", "full") == 0
    told = capsys.readouterr().out
    assert "the engine changed since the checkpoint (checkpointing: none -> full): no longer bit for bit" in told


def test_fresh_sets_the_old_run_aside_and_starts_at_the_beginning(copy, capsys):
    before = (run_of(copy) / "metrics.jsonl").read_bytes()
    for count in (1, 2):
        assert train(copy, "--fresh", "--run.seed", str(count), "--train.sample_every", "0") == 0
        assert f"run.previous-{count}" in capsys.readouterr().out
    assert (copy.parent / "run.previous-1" / "metrics.jsonl").read_bytes() == before
    assert [line["step"] for line in records(run_of(copy))] == [1, 2, 3]


def test_fresh_with_a_mistake_leaves_the_old_run_where_it_is(copy, capsys, tmp_path):
    refused(capsys, copy, "--fresh", "--data.cache", str(tmp_path / "nowhere"))
    assert (run_of(copy) / "metrics.jsonl").exists()


def test_videos_that_a_kill_cut_off_are_made_by_the_next_start(copy, capsys):
    """The state is saved before the videos, which take minutes and may fail."""
    shutil.rmtree(run_of(copy) / "samples" / "step-000003")
    assert train(copy) == 0
    assert (run_of(copy) / "samples" / "step-000003" / "sheet.png").exists()
    assert train(copy) == 0
    assert "finished at step 3" in capsys.readouterr().out


def test_what_a_kill_left_half_written_is_swept(copy):
    run = run_of(copy)
    (run / "adapter.safetensors.tmp-1-0").write_bytes(b"half")
    (run / "adapters" / "step-000009.safetensors.tmp-1-0").write_bytes(b"half")
    (run / "checkpoints" / "step-000009.tmp-1").mkdir()
    assert train(copy) == 0
    assert not list(run.rglob("*.tmp-*"))


# Starting from an adapter


def test_training_starts_from_another_adapter(copy, tmp_path):
    source = run_of(copy) / "adapter.safetensors"
    folder = tmp_path / "next"
    words = ["--run.folder", str(folder), "--adapter.init_adapter", str(source), "--train.sample_every", "0"]
    assert train(copy, *words) == 0
    first, start = records(folder, "heldout")[0], records(run_of(copy), "heldout")[-1]
    assert first["step"] == 0
    assert first["heldout/loss"] == start["heldout/loss"], "untrained, it is that adapter"
    assert distance(folder / "adapter.safetensors", source) > 0
    moved = tmp_path / "moved.safetensors"
    source.rename(moved)
    assert train(copy, *words, "--train.steps", "4") == 0, "going on needs the state, not the file it began with"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--adapter.rank", "8"], "rank 4, this configuration 8; set adapter.rank: 4"),
        (["--adapter.alpha", "4"], "alpha 8.0, this configuration 4.0; set adapter.alpha: 8.0"),
    ],
)
def test_an_adapter_that_means_something_else_is_no_start(copy, capsys, tmp_path, words, told):
    start = str(run_of(copy) / "adapter.safetensors")
    folder = tmp_path / "next"
    assert told in refused(capsys, copy, "--run.folder", str(folder), "--adapter.init_adapter", start, *words)
    assert not folder.exists()


def test_a_start_for_other_targets_is_refused(copy, capsys, tmp_path):
    start = str(run_of(copy) / "adapter.safetensors")
    words = ["--run.folder", str(tmp_path / "next"), "--adapter.init_adapter", start, "--adapter.targets", "visual_attention"]
    assert "differ from what rank and targets ask for" in refused(capsys, copy, *words)


# Bad input


@pytest.fixture
def start(tmp_path, tiny):
    """A run that has not begun."""
    return make_run(tmp_path / "start", tiny)


def test_training_before_encoding_names_the_command(start, capsys):
    shutil.rmtree(start.parent / "cache")
    assert "run `mochi-lora encode` with this configuration first" in refused(capsys, start)


@pytest.mark.parametrize("component", ["vae", "text_encoder", "tokenizer"])
def test_a_cache_of_another_encoder_is_refused(start, tiny, tmp_path, capsys, component):
    base = shutil.copytree(tiny, tmp_path / "base")
    config = min((base / component).glob("*.json"))
    config.write_text(config.read_text() + " ")
    told = refused(capsys, start, "--model.base", str(base))
    assert f"encoded with another {component}" in told
    assert "run encode again, or put the old value back" in told


def test_a_sample_prompt_that_was_not_embedded_is_named_before_anything_is_written(start, capsys):
    told = refused(capsys, start, "--train.sample_every", "2", "--sample.prompts", "[a zebra]")
    assert "'a zebra' of sample is not in the cache" in told
    assert not run_of(start).exists()


def test_a_gpu_that_is_not_there_is_said(start, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "engine.device: cuda was asked for, but torch sees no GPU here" in refused(capsys, start, "--engine.device", "cuda")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_cache_entry_stops_the_run_by_name_and_mending_it_lets_it_go_on(start, capsys, workers):
    path = Cache(start.parent / "cache").path("latents", latents_name(3))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 8
    path.write_bytes(bytes(flipped))
    told = refused(capsys, start, "--data.loader_workers", workers)
    assert f"{path}: damaged cache entry (its content does not match its checksum)" in told
    path.write_bytes(whole)
    assert train(start) == 0
    assert [line["step"] for line in records(run_of(start))] == [1, 2, 3, 4, 5, 6]


def test_a_non_finite_loss_stops_the_run_names_the_clip_and_keeps_the_last_good_state(start, capsys):
    cache = Cache(start.parent / "cache")
    poison = posterior(SMALL, 1)
    path = cache.path("latents", latents_name(1))
    path.unlink()
    cache.write_latents(latents_name(1), Posterior(torch.full_like(poison.mean, float("inf")), poison.logvar), {})
    words = ["--train.steps", "12", "--train.log_every", "5", "--train.checkpoint_every", "1", "--train.keep_checkpoints", "99"]
    told = refused(capsys, start, *words)
    assert "non-finite loss at step" in told
    assert "clip-1.mp4 at sigma 0." in told
    step = int(told.partition("non-finite loss at step ")[2].partition(":")[0])
    run = run_of(start)
    states = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert states == [f"step-{number:06d}" for number in range(step)], "the bad step is not among them"
    assert step <= 6, "each clip comes once an epoch"
    adapters = [load_adapter(path).tensors for path in (run / "adapters").glob("*.safetensors")]
    assert all(torch.isfinite(tensor).all() for tensors in adapters for tensor in tensors.values())
    with safe_open(run / f"non-finite-step-{step:06d}-rank0.safetensors", framework="pt") as replay:
        assert "clip-1.mp4" in replay.metadata()["clips"].split("\n")
        assert not torch.isfinite(replay.get_tensor("micro0.clean")).all()
    assert refused(capsys, start, *words) == told, "the same command fails the same way, from the last good state"


def test_an_error_in_a_sample_video_loses_no_step(start, monkeypatch):
    def fail(_self, _model, _done):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("mochi_lora.runs.previews.Previews.make", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(start, "--train.sample_every", "6", "--train.checkpoint_every", "6")
    monkeypatch.undo()
    assert train(start, "--train.sample_every", "6") == 0


def test_a_run_declared_finished_by_fewer_steps_still_leaves_its_final_adapter(copy):
    run = run_of(copy)
    (run / "adapter.safetensors").unlink()
    assert train(copy, "--train.steps", "2", "--train.warmup_steps", "0") == 0
    assert read_provenance(run / "adapter.safetensors")["step"] == 3
    before = (run / "adapter.safetensors").read_bytes()
    assert train(copy, "--train.steps", "2", "--train.warmup_steps", "0") == 0
    assert (run / "adapter.safetensors").read_bytes() == before, "now there is nothing left to do"


def test_a_damaged_final_adapter_is_written_again(copy):
    final = run_of(copy) / "adapter.safetensors"
    whole = final.read_bytes()
    final.write_bytes(whole[:100])
    assert train(copy) == 0
    assert read_provenance(final)["step"] == 3


def test_a_second_start_of_a_running_run_is_refused(copy, capsys):
    with only_one(run_of(copy), "training"):
        assert "another process is training here" in refused(capsys, copy)


def test_a_cache_made_for_another_hub_model_or_precision_is_refused(start, capsys):
    told = refused(capsys, start, "--model.base", "somebody/another-mochi")
    assert "encoded with model.base, model.revision = " in told
    assert "somebody/another-mochi" in told
    assert "encoded with encode.text_precision" in refused(capsys, start, "--encode.text_precision", "int8")


def test_videos_cut_short_by_a_signal_leave_no_sheet_and_are_made_by_the_next_start(copy, monkeypatch):
    run = run_of(copy)
    shutil.rmtree(run / "samples" / "step-000003")
    monkeypatch.setattr("mochi_lora.commands.train._previews", _cut_short)
    with pytest.raises(SystemExit, match="143"):
        train(copy)
    assert not (run / "samples" / "step-000003" / "sheet.png").exists()
    monkeypatch.undo()
    assert train(copy) == 0
    assert (run / "samples" / "step-000003" / "sheet.png").exists()


def _cut_short(config, processes, sources, stop, ranks):
    """As if SIGTERM came with the first denoising step."""

    def cancelled():
        stop.requested = signal.SIGTERM
        return True

    return Previews(config, processes, sources.prompts, cancelled, ranks)


def test_a_full_gpu_is_an_error_with_a_way_out(start, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("mochi_lora.commands.train.load_planned", full)
    told = refused(capsys, start)
    assert "the GPU's memory is full (CUDA out of memory. Tried to allocate 20.00 MiB.)" in told
    assert "engine.plan smallest" in told

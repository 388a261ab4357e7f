"""On a CUDA device: the whole road with a tiny Mochi, resume, every optimiser and kernel, the VAE at full size.

Run with `pytest -m gpu`. Footage is MPEG-TS written and read by PyAV, so that no decoder but that one is needed.
"""

import gc
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mochi_lora.cli import main
from mochi_lora.commands import train
from mochi_lora.engine.attention import attend, check_attention
from mochi_lora.inference.video import write_mp4
from mochi_lora.model.tiny import build_tiny
from mochi_lora.model.vae import MochiVae

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


def write_clip(path: Path, hue: int) -> None:
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        ramp = np.linspace(0, 255, 160, dtype=np.uint8)
        for index in range(24):
            picture = np.zeros((96, 160, 3), np.uint8)
            picture[..., hue % 3] = np.roll(ramp, 5 * index)
            picture[20 + index : 40 + index, 30:60, (hue + 1) % 3] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A configuration file over a tiny model and three clips, encoded on the GPU."""
    root = tmp_path_factory.mktemp("road")
    build_tiny(root / "model")
    (root / "clips").mkdir()
    for index in range(3):
        write_clip(root / "clips" / f"clip{index}.ts", index)
        (root / "clips" / f"clip{index}.txt").write_text(f"a bar of colour {index} moving down")
    content = {
        "run": {"folder": str(root / "run")},
        "model": {"base": str(root / "model")},
        "data": {"clips": str(root / "clips"), "cache": str(root / "cache"), "buckets": ["19x64x112"]},
        "train": {
            "steps": 12,
            "warmup_steps": 2,
            "log_every": 1,
            "checkpoint_every": 4,
            "validate_every": 6,
            "sample_every": 12,
        },
        "engine": {"device": "cuda", "precision": "bf16", "checkpointing": "full", "block_swap": 0, "compile": False},
        "sample": {"prompts": ["a bar of colour"], "frames": 19, "height": 64, "width": 112, "steps": 8},
        "tracking": {"trackers": []},
    }
    config = root / "gpu.yaml"
    config.write_text(yaml.safe_dump(content))
    assert main(["encode", "--config", str(config)]) == 0
    return root, str(config)


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if record["kind"] == "train"]


def test_the_whole_road_runs_and_the_sample_shows_frames(road, tmp_path):
    root, config = road
    assert main(["train", "--config", config]) == 0
    assert len(losses(root / "run")) == 12
    assert np.isfinite(losses(root / "run")).all()
    assert main(["sample", "--config", config, "--output", str(tmp_path)]) == 0
    with av.open(str(next(tmp_path.glob("*.mp4")))) as video:
        assert sum(1 for _ in video.decode(video=0)) == 19
    assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_a_run_resumed_from_its_checkpoint_goes_on_like_one_never_stopped(road, tmp_path, optimizer):
    _, config = road
    shared = [
        "--config",
        config,
        "--train.optimizer",
        optimizer,
        "--train.sample_every",
        "0",
        "--train.lr_schedule",
        "constant",
    ]
    assert main(["train", *shared, "--run.folder", str(tmp_path / "straight")]) == 0
    halves = [*shared, "--run.folder", str(tmp_path / "halves")]
    assert main(["train", *halves, "--train.steps", "8"]) == 0
    assert main(["train", *halves]) == 0
    np.testing.assert_allclose(losses(tmp_path / "halves"), losses(tmp_path / "straight"), rtol=1e-5)
    straight, resumed = (load_file(tmp_path / name / "adapter.safetensors") for name in ("straight", "halves"))
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_gpu_that_fills_up_names_the_plan_and_what_makes_it_fit(road, tmp_path, capfd, monkeypatch):
    """The caching allocator's own limit, as a real run meets it in the middle of a step: set once the base is loaded."""
    _, config = road
    load = train.load_planned

    def into_a_full_gpu(*given):
        loaded = load(*given)
        gc.collect()
        torch.cuda.empty_cache()
        room = torch.cuda.memory_reserved() + 24 * 2**20  # of a step's feed-forward layers one or two fit
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(CUDA).total_memory)
        return loaded

    monkeypatch.setattr(train, "load_planned", into_a_full_gpu)
    settings = ["--run.folder", str(tmp_path / "run"), "--train.sample_every", "0", "--train.batch_size", "64"]
    try:
        assert main(["train", "--config", config, *settings]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    told = " ".join(capfd.readouterr().err.split())
    assert "the GPU's memory is full (CUDA out of memory." in told
    assert "The plan was" in told
    assert "GiB while" in told
    assert "GiB: set, below engine," in told or "no plan is much smaller" in told


def test_offloading_changes_no_frame(road, tmp_path, monkeypatch):
    """Compared before x264, which may write other bytes for the same frames."""
    made = []
    monkeypatch.setattr(
        "mochi_lora.inference.shots.write_mp4", lambda path, frames: (made.append(frames), write_mp4(path, frames))
    )
    root, config = road
    if not (root / "run" / "adapter.safetensors").exists():
        assert main(["train", "--config", config]) == 0
    for name, offload in (("on", "true"), ("off", "false")):
        assert main(["sample", "--config", config, "--output", str(tmp_path / name), "--engine.cpu_offload", offload]) == 0
    assert len(made) == 2
    np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.parametrize("attention", ["auto", "cudnn", "flash", "efficient", "math"])
def test_every_kernel_is_finite_and_close_to_float32(attention):
    check_attention(attention, CUDA, torch.bfloat16, 128)
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, 128, device=CUDA, generator=generator) for _ in range(3))
    exact = attend(q, k, v, (300, 211), "math")
    close = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), (300, 211), attention)
    assert torch.linalg.vector_norm(close.float() - exact) / torch.linalg.vector_norm(exact) < 1e-2
    assert not close[1, 211:].any()


def test_a_training_step_does_not_wait_for_the_device(road, tmp_path):
    """torch raises on every synchronising call inside the steps between two log lines."""
    from accelerate import Accelerator

    from mochi_lora.config.load import load_config
    from mochi_lora.data.cache import Cache
    from mochi_lora.data.index import read_index
    from mochi_lora.model import adapter as lora
    from mochi_lora.model.flow import LatentStats
    from mochi_lora.model.transformer import VelocityModel
    from mochi_lora.model.weights import load_transformer
    from mochi_lora.runs.models import sampling_plan
    from mochi_lora.training.batches import SampleSource
    from mochi_lora.training.health import Health
    from mochi_lora.training.optimizer import build_optimizer
    from mochi_lora.training.trainer import Learner, train_step

    root, path = road
    config = load_config(Path(path), [])
    index = read_index(config.data)
    plan = sampling_plan(config).plan
    transformer = load_transformer(root / "model" / "transformer", device=CUDA, precision="bf16").transformer
    parameters = lora.attach(transformer, config.adapter, 0)
    model = VelocityModel(transformer, plan).train()
    optimizer = build_optimizer(config.train, parameters.values())
    learner = Learner(Accelerator(), model, parameters, optimizer, None, config.train, config.objective, 0)
    stats = LatentStats(index.latents_mean, index.latents_std)
    source = SampleSource(Cache(config.data.cache), tuple(index.of("train")), stats, config.objective, 0)
    health = Health(CUDA, tmp_path, 0)
    batches = [source.batch((0,), (position,)).pin_memory() for position in range(4)]
    train_step(learner, health, 0, [batches[0]])  # first use allocates and loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            train_step(learner, health, step, [batches[step]])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    health.check()


def test_a_long_clip_is_encoded_as_its_beginning_alone_would_be():
    """The VAE is causal: 163 frames and their first 79 share the first 14 latent frames. Full-size VAE, random weights."""
    from diffusers import AutoencoderKLMochi

    with torch.random.fork_rng(devices=[CUDA]):
        torch.manual_seed(0)
        vae = MochiVae(AutoencoderKLMochi().to(CUDA), precision="bf16")
        pixels = torch.rand(3, 163, 480, 848, device=CUDA) * 2 - 1
    whole = vae.encode(pixels).mean
    beginning = vae.encode(pixels[:, :79]).mean
    error = torch.linalg.vector_norm(whole[:, :14] - beginning) / torch.linalg.vector_norm(beginning)
    assert error < 2e-2, float(error)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 3e-2)])
@pytest.mark.parametrize("frames", [1, 7, 25])
def test_the_vae_computes_on_a_gpu_what_it_computes_on_a_cpu(frames: int, precision: str, bound: float):
    """Compiled passes, cuDNN's layouts and small chunks against none of these."""
    from diffusers import AutoencoderKLMochi

    widths = (32, 32, 64, 64)
    with torch.random.fork_rng(devices=[CUDA]):
        torch.manual_seed(0)
        module = AutoencoderKLMochi(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=(1, 1, 2, 1, 1)
        )
        pixels = torch.rand(3, frames, 64, 96) * 2 - 1
        latents = torch.randn(12, (frames - 1) // 6 + 1, 8, 12)
    exact = MochiVae(module, precision="fp32")
    quick = MochiVae(module.to(CUDA), precision=precision, chunk_elements=200_000)
    for found, expected in (
        (quick.encode(pixels).mean, exact.encode(pixels).mean),
        (quick.encode(pixels).logvar, exact.encode(pixels).logvar),
        (quick.decode(latents), exact.decode(latents)),
    ):
        assert torch.linalg.vector_norm(found.cpu() - expected) < bound * torch.linalg.vector_norm(expected)

"""Seconds and memory of one training step of the full-size Mochi with random weights, one JSON line per case.

    python benchmarks/train_step.py --frames 37
    python benchmarks/train_step.py --frames 37 163 --trainer mochi-lora diffusers

`mochi-lora` runs the project's own step with its cache, data loader, optimiser and health check. `diffusers` is the
yardstick: stock model, stock processor, PEFT LoRA on the same modules, its own checkpointing, AdamW. Both learn random
latents; nothing about quality is claimed. Predictions and outcomes belong into benchmarks/LOG.md.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import MochiTransformer3DModel
from peft import LoraConfig

from mochi_lora.config.schema import AdapterConfig, ObjectiveConfig, TrainConfig
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import IndexEntry
from mochi_lora.data.plan import BatchPlan, Share
from mochi_lora.data.samples import Posterior, TextEmbedding
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import compute_dtype
from mochi_lora.model import adapter as lora
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import random_transformer
from mochi_lora.spec import TRANSFORMER_PARAMETERS, Bucket
from mochi_lora.training.batches import MicroSteps, SampleSource, steps_from
from mochi_lora.training.health import Health
from mochi_lora.training.optimizer import build_optimizer
from mochi_lora.training.trainer import Learner, train_step

RESULTS = Path(__file__).parent / "results" / "train_step.jsonl"
CLIPS = 8
TEXT_TOKENS = (120, 96, 143, 120, 80, 120, 171, 110)  # captions differ in length, as real ones do
Step = Callable[[], tuple[torch.Tensor, int]]  # -> (loss on the device, visual tokens)


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    trainer: str
    bucket: Bucket
    rank: int
    plan: Plan
    warmup: int
    steps: int


@dataclass(frozen=True)
class Setup:
    """The model with its adapter, shared by the cases of one trainer."""

    transformer: MochiTransformer3DModel
    parameters: dict[str, torch.nn.Parameter]
    device: torch.device


def main() -> None:
    """Run every (trainer, frames) case on one model per trainer."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.memory_cap_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(arguments.memory_cap_gib / total)
    plan = Plan(device.type, arguments.precision, arguments.attention, arguments.checkpointing)
    for trainer in arguments.trainer:
        transformer = random_transformer(_model_config(arguments), device=device, precision=plan.precision)
        count = sum(parameter.numel() for parameter in transformer.parameters())
        _say(f"{trainer}: {count:,} parameters (full size: {TRANSFORMER_PARAMETERS:,})")
        setup = Setup(transformer, _attach(trainer, transformer, arguments.rank), device)
        for frames in arguments.frames:
            bucket = Bucket(frames, arguments.height, arguments.width)
            case = Case(trainer, bucket, arguments.rank, plan, arguments.warmup, arguments.steps)
            line = measure(case, setup) | {"memory_cap_gib": arguments.memory_cap_gib, "layers": arguments.layers}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            _say(json.dumps(line))
        del transformer, setup
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(case: Case, setup: Setup) -> dict[str, Any]:
    """Warm up, then time `case.steps` steps one by one; the device is waited for at the end of each."""
    cuda = setup.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        steps = our_steps(case, setup, Path(folder)) if case.trainer == "mochi-lora" else stock_steps(case, setup)
        seconds, losses, tokens = [], [], 0
        start = time.perf_counter()
        for step in steps:
            loss, tokens = step()
            losses.append(float(loss))  # waits
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    timed = seconds[case.warmup :]
    return {
        "benchmark": "train_step",
        "trainer": case.trainer,
        "gpu": torch.cuda.get_device_name() if cuda else "none (CPU)",
        "world_size": 1,
        "frames": case.bucket.frames,
        "height": case.bucket.height,
        "width": case.bucket.width,
        "rank": case.rank,
        "plan": asdict(case.plan),
        "step_seconds": {"min": min(timed), "median": statistics.median(timed), "max": max(timed)},
        "first_step_seconds": seconds[0],
        "steps": len(timed),
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "tokens_per_second": tokens / statistics.median(timed),
        "finite": bool(torch.isfinite(torch.tensor(losses)).all()),
        "losses": [round(loss, 6) for loss in losses],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers", "peft")},
    }


def _attach(trainer: str, transformer: MochiTransformer3DModel, rank: int) -> dict[str, torch.nn.Parameter]:
    """Joint attention in both; the suffix list a diffusers user would write also hits the caption pooler."""
    if trainer == "mochi-lora":
        return lora.attach(transformer, AdapterConfig(rank=rank, alpha=rank), seed=0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), lora.TRAINED)
    return lora.trainable(transformer)


def our_steps(case: Case, setup: Setup, folder: Path) -> Iterator[Step]:
    """The project's own step, loader and health check over a cache written for the occasion."""
    settings = TrainConfig(steps=case.warmup + case.steps, warmup_steps=0)
    transformer, parameters, device = setup.transformer, setup.parameters, setup.device
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    model = VelocityModel(transformer, case.plan).train()
    optimizer = build_optimizer(settings, parameters.values())
    learner = Learner(accelerator, model, parameters, optimizer, None, settings, ObjectiveConfig(), seed=0)
    health = Health(device, folder, rank=0)
    share = Share(batch_size=1, accumulation=1)
    micro_steps = MicroSteps(_source(case, transformer, folder), BatchPlan((case.bucket,) * CLIPS, 0, 1), share)
    for number, batches in steps_from(micro_steps, share, 0, settings.steps, workers=2, pin=device.type == "cuda"):

        def step(number: int = number, batches: list = batches) -> tuple[torch.Tensor, int]:
            result = train_step(learner, health, number, batches)
            health.check()
            return result.loss, result.tokens

        yield step


def stock_steps(case: Case, setup: Setup) -> Iterator[Step]:
    """diffusers + PEFT as a user would write it; the batch stands ready on the device."""
    transformer, parameters, device = setup.transformer, setup.parameters, setup.device
    transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, fused=True)
    shape = (1, *case.bucket.latent_shape)
    text = torch.randn(1, 256, transformer.config.text_embed_dim, device=device, dtype=compute_dtype(case.plan.precision))
    mask = (torch.arange(256, device=device) < TEXT_TOKENS[0]).unsqueeze(0)

    def step() -> tuple[torch.Tensor, int]:
        clean, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
        sigma = torch.rand(1, device=device)
        noisy = (1 - sigma) * clean + sigma * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=case.plan.precision == "bf16"):
            velocity = transformer(noisy, text, (1 - sigma) * 1000, mask, return_dict=False)[0]
        loss = (velocity.float() - (clean - noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), case.bucket.tokens

    yield from repeat(step, case.warmup + case.steps)


def _source(case: Case, transformer: MochiTransformer3DModel, folder: Path) -> SampleSource:
    """A cache of random latents and captions."""
    cache = Cache(folder)
    generator = torch.Generator().manual_seed(0)
    shape = case.bucket.latent_shape
    entries = []
    for number, tokens in zip(range(CLIPS), TEXT_TOKENS, strict=True):
        key = f"{number:032d}"
        mean = torch.randn(shape, generator=generator)
        cache.write_latents(key, Posterior(mean, torch.full(shape, -6.0)), {})
        text = torch.randn(tokens, transformer.config.text_embed_dim, generator=generator)
        cache.write_text(key, TextEmbedding(text), {})
        entries.append(IndexEntry(f"clip {number}", key, str(case.bucket), key, key, "", "train"))
    channels = case.bucket.latent_shape[0]
    return SampleSource(cache, tuple(entries), LatentStats((0.0,) * channels, (1.0,) * channels), ObjectiveConfig(), seed=0)


def _model_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Mochi-1's published dimensions are the class's defaults; --layers and --heads make it small enough to try."""
    return {"num_layers": arguments.layers, "num_attention_heads": arguments.heads}


def _say(text: str) -> None:
    print(text, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[37])
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--trainer", nargs="+", choices=("mochi-lora", "diffusers"), default=["mochi-lora"])
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--attention", choices=("auto", "cudnn", "flash", "efficient", "math"), default="auto")
    parser.add_argument("--checkpointing", choices=("full", "none"), default="full")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--memory-cap-gib", type=float, help="torch.cuda.set_per_process_memory_fraction for the whole run")
    parser.add_argument("--layers", type=int, default=48, help="fewer to try it out")
    parser.add_argument("--heads", type=int, default=24, help="fewer to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

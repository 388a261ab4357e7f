"""Training steps and sampling passes on several GPUs against one of them, one JSON line per case.

    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --frames 37 85 163

The first process measures alone while the others wait, then all measure each way of sharing: `data` (each its own samples),
`context` (one sample's tokens), `shard` (as data, with the base split). `speed_up` is samples per second over those of one
process in the same call. Weights and clips are random; nothing about quality is claimed. To try it on a CPU:

    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --frames 7 --height 32 --width 48 --layers 2 --heads 6
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from train_step import GIB, RESULTS, about, append, attach, figures, say

from mochi_lora.config.schema import TrainConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.mesh import ALONE, Ranks, layout_of, open_ranks
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.swap import home_of
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.model.weights import random_transformer
from mochi_lora.spec import Bucket
from mochi_lora.training.trial import TEXT_TOKENS, random_steps, run_trial

MODES = ("data", "context", "shard")
_WAIT_MINUTES = 60.0


@dataclass(frozen=True)
class Measured:
    """One mode at one size, on this rank."""

    trial: dict[str, Any]
    pass_seconds: float
    static_gib: float | None


def main() -> None:
    """Every size in every mode that its tokens allow; a case that fails on a rank ends the call."""
    arguments = parsed()
    cuda = torch.cuda.is_available()
    processes = Accelerator(mixed_precision="no", cpu=not cuda)
    world = processes.num_processes
    base = Plan("cuda" if cuda else "cpu", arguments.precision, "auto", arguments.checkpointing, compile=arguments.compile)
    buckets = [Bucket(frames, arguments.height, arguments.width) for frames in arguments.frames]
    alone: dict[Bucket, Measured] = {}
    if processes.is_main_process:
        alone = measured(arguments, base, ALONE, buckets, processes.device)
        for bucket in buckets:
            append(arguments.output, line(arguments, "alone", bucket, base, alone[bucket], None, 1))
    for mode in arguments.modes if world > 1 else ():
        processes.wait_for_everyone()
        setting = {"data": "auto", "context": f"context:{world}", "shard": f"shard:{world}"}[mode]
        ranks = open_ranks(layout_of(setting, world), _WAIT_MINUTES)
        plan = replace(base, context=ranks.layout.context, shard=ranks.layout.shard)
        fitting = [bucket for bucket in buckets if bucket.tokens % ranks.layout.context == 0]
        found = measured(arguments, plan, ranks, fitting, processes.device)
        for bucket in fitting if processes.is_main_process else ():
            append(arguments.output, line(arguments, mode, bucket, plan, found[bucket], alone[bucket], ranks.layout.data))
    processes.end_training()


def measured(
    arguments: argparse.Namespace, plan: Plan, ranks: Ranks, buckets: list[Bucket], device: torch.device
) -> dict[Bucket, Measured]:
    """All sizes on one model."""
    dimensions = {"num_layers": arguments.layers, "num_attention_heads": arguments.heads}
    home = partial(home_of, depth=arguments.layers, plan=plan) if plan.shard > 1 else None
    torch.compiler.reset()
    transformer = random_transformer(dimensions, device=device, precision=plan.precision, home=home)
    parameters = attach("mochi-lora", transformer, arguments.rank)
    model = VelocityModel(transformer, plan, ranks)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    static = torch.cuda.memory_allocated(device) / GIB if cuda else None
    found = {}
    for bucket in buckets:
        if ranks.rank == 0:
            say(f"{bucket} on {ranks.layout.world}: {ranks.layout}, {plan}")
        settings = TrainConfig(steps=arguments.warmup + arguments.steps, warmup_steps=0)
        with tempfile.TemporaryDirectory() as folder:
            trial = run_trial(random_steps(model, parameters, bucket, settings, Path(folder)), device, arguments.warmup)
        found[bucket] = Measured(figures(trial), pass_seconds(model, bucket, arguments), static)
    del model, transformer, parameters
    if cuda:
        torch.cuda.empty_cache()
    return found


@torch.no_grad()
def pass_seconds(model: VelocityModel, bucket: Bucket, arguments: argparse.Namespace) -> float:
    """Median of one velocity without gradients; a guided denoising step is two."""
    model.eval()
    device, cuda = model.device, model.device.type == "cuda"
    latents = torch.randn((1, *bucket.latent_shape), device=device)
    width = model.transformer.config.text_embed_dim
    text = TextBatch.collate([TextEmbedding(torch.randn(TEXT_TOKENS[0], width))]).to(device)
    sigma, seconds = torch.full((1,), 0.5, device=device), []
    for _ in range(arguments.warmup + arguments.steps):
        start = time.perf_counter()
        model(latents, sigma, text)
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[arguments.warmup :])


def line(
    arguments: argparse.Namespace, mode: str, bucket: Bucket, plan: Plan, found: Measured, alone: Measured | None, data: int
) -> dict[str, Any]:
    """What goes into the results, of the main process; `data` samples are worked on at a time."""
    against = {}
    if alone is not None:
        seconds = found.trial["step_seconds"]["median"]
        against = {
            "speed_up": data * alone.trial["step_seconds"]["median"] / seconds,
            "sampling_speed_up": data * alone.pass_seconds / found.pass_seconds,
            "static_share": found.static_gib / alone.static_gib if found.static_gib and alone.static_gib else None,
        }
    return {
        **about("scale", bucket, plan, arguments, 1 if alone is None else dist.get_world_size()),
        "mode": mode,
        **found.trial,
        "pass_seconds": found.pass_seconds,
        "static_gib": found.static_gib,
        **against,
    }


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[37, 85, 163])
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precision", choices=("bf16", "fp8", "fp32"), default="bf16")
    parser.add_argument("--checkpointing", default="attention_saved")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--layers", type=int, default=48, help="fewer to try it out")
    parser.add_argument("--heads", type=int, default=24, help="fewer to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Training steps and sampling passes on several GPUs against one of them, one JSON line per case.

    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --frames 37 85 163

The first process measures alone while the others wait, then all measure each way of sharing: `data` (each its own samples),
`context` (one sample's tokens), `shard` (as data, with the base split). `speed_up` is samples per second over those of one
process in the same call, `sampling_speed_up` the same of guided denoising steps with the adapter, `speed_against_data` the
speed of a split base over that of `data`. On a GPU blocks are compiled and attention is cuDNN's, as `predict_scale.py` has
it. All captions are equally long: cuDNN plans anew for each length, and the modes would meet different ones while they are
timed. Weights and clips are random; nothing about quality is claimed. To try it on a CPU:

    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --frames 7 --height 32 --width 48 --layers 2 --heads 6
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from sample_step import guided_step
from train_step import GIB, RESULTS, about, append, attach, cap_memory, figures, say

from mochi_lora.config.schema import TrainConfig
from mochi_lora.engine.allocator import expand_segments
from mochi_lora.engine.kernels import Attention
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.swap import home_of
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import random_transformer
from mochi_lora.parallel.mesh import ALONE, Layout, Ranks, layout_of, open_ranks
from mochi_lora.runs.processes import open_processes
from mochi_lora.spec import Bucket
from mochi_lora.training.trial import TEXT_TOKENS, random_steps, run_trial

MODES = ("data", "context", "shard")
_CAPTIONS = TEXT_TOKENS[:1] * len(TEXT_TOKENS)
_WAIT_MINUTES = 60.0


@dataclass(frozen=True)
class Measured:
    """One mode at one size, on this rank."""

    trial: dict[str, Any]
    guided_seconds: float
    static_gib: float | None


def main() -> None:
    """Every size in every mode that its tokens allow; a case that fails on a rank ends the call."""
    expand_segments()
    arguments = parsed()
    with open_processes("auto", _WAIT_MINUTES) as processes:  # for the others while the first one measures alone
        run(arguments, processes)


def run(arguments: argparse.Namespace, processes: Accelerator) -> None:
    """By one process of the launch."""
    world, device = processes.num_processes, processes.device
    cap_memory(arguments.memory_cap_gib, device)
    cuda = device.type == "cuda"
    attention: Attention = arguments.attention or ("cudnn" if cuda else "auto")
    compiled = cuda if arguments.compile is None else arguments.compile
    base = Plan(device.type, arguments.precision, attention, arguments.checkpointing, compile=compiled)
    buckets = [Bucket(frames, arguments.height, arguments.width) for frames in arguments.frames]
    found: dict[str, dict[Bucket, Measured]] = {"alone": {}}
    processes.wait_for_everyone()  # what cannot talk fails now, not after the first process has measured alone
    if processes.is_main_process:
        for bucket, one in measured(arguments, base, ALONE, buckets, device):
            found["alone"][bucket] = one
            append(arguments.output, line(arguments, "alone", bucket, base, found, ALONE.layout))
    for mode in arguments.modes if world > 1 else ():
        processes.wait_for_everyone()
        setting = {"data": "auto", "context": f"context:{world}", "shard": f"shard:{world}"}[mode]
        ranks = open_ranks(layout_of(setting, world), _WAIT_MINUTES)
        plan = replace(base, context=ranks.layout.context, shard=ranks.layout.shard)
        fitting = [bucket for bucket in buckets if bucket.tokens % ranks.layout.context == 0]
        found[mode] = {}
        for bucket, one in measured(arguments, plan, ranks, fitting, device):
            found[mode][bucket] = one
            if processes.is_main_process:
                append(arguments.output, line(arguments, mode, bucket, plan, found, ranks.layout))
    processes.end_training()


def measured(
    arguments: argparse.Namespace, plan: Plan, ranks: Ranks, buckets: list[Bucket], device: torch.device
) -> Iterator[tuple[Bucket, Measured]]:
    """Each size, all on one model."""
    dimensions = {"num_layers": arguments.layers, "num_attention_heads": arguments.heads}
    home = partial(home_of, depth=arguments.layers, plan=plan) if plan.shard > 1 else None
    torch.compiler.reset()
    gc.collect()  # what compiled blocks of the mode before still hold
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0  # cuBLAS's workspaces, from the second mode on
    transformer = random_transformer(dimensions, device=device, precision=plan.precision, home=home)
    parameters = attach("mochi-lora", transformer, arguments.rank)
    model = VelocityModel(transformer, plan, ranks)
    if cuda:
        torch.cuda.empty_cache()
    static = (torch.cuda.memory_allocated(device) - before) / GIB if cuda else None
    for bucket in buckets:
        if ranks.rank == 0:
            say(f"{bucket} on {ranks.layout.world}: {ranks.layout}, {plan}")
        settings = TrainConfig(steps=arguments.warmup + arguments.steps, warmup_steps=0)
        with tempfile.TemporaryDirectory() as folder:
            steps = random_steps(model, parameters, bucket, settings, Path(folder), _CAPTIONS)
            trial = figures(run_trial(steps, device, arguments.warmup))
        trial["tokens_per_second"] *= ranks.layout.data
        yield bucket, Measured(trial, guided_seconds(model, bucket, arguments), static)
    del model, transformer, parameters
    if cuda:
        torch.cuda.empty_cache()


@torch.no_grad()
def guided_seconds(model: VelocityModel, bucket: Bucket, arguments: argparse.Namespace) -> float:
    """Median of one guided denoising step."""
    model.eval()
    step, seconds = guided_step(model, bucket), []
    for _ in range(arguments.warmup + arguments.steps):
        start = time.perf_counter()
        step()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[arguments.warmup :])


def line(
    arguments: argparse.Namespace,
    mode: str,
    bucket: Bucket,
    plan: Plan,
    found: dict[str, dict[Bucket, Measured]],
    layout: Layout,
) -> dict[str, Any]:
    """What goes into the results, of the main process: `mode` beside what was `found` of one process, and of data ranks."""
    mine, alone, data = found[mode][bucket], found["alone"][bucket], found.get("data", {}).get(bucket)
    against: dict[str, float | None] = {}
    if mode != "alone":
        against = {
            "speed_up": layout.data * _seconds(alone) / _seconds(mine),
            "sampling_speed_up": layout.data * alone.guided_seconds / mine.guided_seconds,
            "static_share": mine.static_gib / alone.static_gib if mine.static_gib and alone.static_gib else None,
        }
    if mode == "shard":
        against["speed_against_data"] = _seconds(data) / _seconds(mine) if data else None
    return {
        **about("scale", bucket, plan, arguments, layout.world),
        "memory_cap_gib": arguments.memory_cap_gib,
        "mode": mode,
        **mine.trial,
        "guided_step_seconds": mine.guided_seconds,
        "static_gib": mine.static_gib,
        **against,
    }


def _seconds(measured: Measured) -> float:
    return float(measured.trial["step_seconds"]["median"])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[37, 85, 163])
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precision", choices=("bf16", "fp8", "fp32"), default="bf16")
    parser.add_argument("--checkpointing", default="attention_saved")
    parser.add_argument("--attention", choices=get_args(Attention), help="default: cudnn on a GPU, auto elsewhere")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks; default: on a GPU")
    parser.add_argument("--memory-cap-gib", type=float, help="of each process, as on a smaller GPU")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--layers", type=int, default=48, help="fewer to try it out")
    parser.add_argument("--heads", type=int, default=24, help="fewer to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()

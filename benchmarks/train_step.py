"""Seconds and memory of one training step of the full-size Mochi with random weights, one JSON line per case.

    python benchmarks/train_step.py --frames 37
    python benchmarks/train_step.py --frames 37 163 --plan precision=fp8,attention=flash4,checkpointing=none,compile=true
    python benchmarks/train_step.py --plans plans.jsonl --stock --profile
    python benchmarks/train_step.py --errors
    python benchmarks/train_step.py --errors tiny

`mochi-lora` runs the project's own step with its cache, data loader, optimiser, health check and log lines. `--stock` adds the
yardstick: diffusers' model and processor, PEFT LoRA on the same modules, its own checkpointing, AdamW. Both learn random
latents; nothing about quality is claimed. A line is on disk before the next case starts, with what was predicted. Cases of one
precision and swap share a model. Predictions and outcomes belong into benchmarks/LOG.md.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from kernel_times import PROFILED_STEPS, profiled
from peft import LoraConfig

from mochi_lora.config.engine import checkpointing_runs
from mochi_lora.config.schema import AdapterConfig, TrainConfig
from mochi_lora.engine.allocator import expand_segments
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import compute_dtype
from mochi_lora.engine.swap import home_of
from mochi_lora.errors import UserError
from mochi_lora.model import adapter as lora
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import random_transformer
from mochi_lora.planning.cards import card_of
from mochi_lora.planning.choice import forecast
from mochi_lora.planning.workload import AdapterSize, ModelSize, Workload
from mochi_lora.runs.workloads import adapter_parameters
from mochi_lora.spec import TRANSFORMER_PARAMETERS, Bucket
from mochi_lora.training.trial import TEXT_TOKENS, Step, Trial, random_steps, run_trial

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
STOCK = "diffusers"
FAILURES = (RuntimeError, UserError)  # the first: full memory and missing kernels too; ours: swap that cannot be page-locked


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    trainer: str
    bucket: Bucket
    plan: Plan
    cap_gib: float | None


def main() -> None:
    """Run every case; a case that runs out of memory or fails is a line with its error, and the next one starts."""
    expand_segments()
    arguments = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.errors:
        import plan_errors  # noqa: PLC0415 - beside this file

        layers = min(arguments.layers, 3)
        plan_errors.run(device, arguments.errors, layers=layers, heads=arguments.heads, output=arguments.errors_output)
        return
    run_cases(Bench, cases(arguments, device), model_of, arguments, device)


def run_cases(
    make: type["Bench"], found: list[Any], key: Callable[[Any], object], arguments: argparse.Namespace, device: torch.device
) -> None:
    """A line for each; those next to each other of one `key` run on one bench, and two benches never stand side by side."""
    for _, group in groupby(found, key=key):
        mine = list(group)
        try:
            bench = make(arguments, mine[0], device)
        except FAILURES as error:
            for case in mine:
                append(arguments.output, make.unbuilt(arguments, case, device, error))
        else:
            for case in mine:
                append(arguments.output, bench.line(case))
            del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()


def cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """In the order given, those of one model next to each other."""
    plans = [_plan(text, device) for text in arguments.plan]
    plans += [_plan_of(json.loads(line), device) for path in arguments.plans for line in path.read_text().splitlines() if line]
    plans = plans or [Plan(device.type, "bf16" if device.type == "cuda" else "fp32", "auto", "full")]
    buckets = [Bucket(frames, arguments.height, arguments.width) for frames in arguments.frames]
    found = [Case("mochi-lora", bucket, plan, arguments.memory_cap_gib) for plan in plans for bucket in buckets]
    if arguments.stock:
        whole = replace(plans[0], precision="bf16" if device.type == "cuda" else "fp32", attention="auto", checkpointing="full")
        stock = replace(whole, block_swap=0, compile=False)
        found += [Case(STOCK, bucket, stock, arguments.memory_cap_gib) for bucket in buckets]
    models = list(dict.fromkeys(model_of(case) for case in found))
    return sorted(found, key=lambda case: models.index(model_of(case)))


class Bench:
    """A transformer with its adapter, and the cases that run on it."""

    def __init__(self, arguments: argparse.Namespace, case: Case, device: torch.device) -> None:
        self._know(arguments, device)
        cap_memory(case.cap_gib, device)
        start = time.perf_counter()
        home = partial(home_of, depth=arguments.layers, plan=case.plan) if case.plan.block_swap else None
        self._transformer = random_transformer(self._dimensions, device=device, precision=case.plan.precision, home=home)
        self._model: VelocityModel | None = None
        self._parameters = attach(case.trainer, self._transformer, arguments.rank)
        count = ModelSize.of(self._dimensions).parameters
        say(f"{case.trainer}, {case.plan.precision}: {count:,} parameters (full size {TRANSFORMER_PARAMETERS:,}), "
            f"{time.perf_counter() - start:.0f} s to make")  # fmt: skip

    @classmethod
    def unbuilt(cls, arguments: argparse.Namespace, case: Case, device: torch.device, error: Exception) -> dict[str, Any]:
        """The line of a case whose model could not be made."""
        bench = cls.__new__(cls)
        bench._know(arguments, device)
        return bench._common(case) | {"error": in_a_line(error)}

    def _know(self, arguments: argparse.Namespace, device: torch.device) -> None:
        """What a line says of its case comes from here: it is written with a model or without."""
        self._arguments, self._device = arguments, device
        # Mochi-1's published dimensions are the class's defaults; --layers and --heads make it small enough to try.
        self._dimensions = {"num_layers": arguments.layers, "num_attention_heads": arguments.heads}

    def line(self, case: Case) -> dict[str, Any]:
        """Measure one case. What it fails with is recorded instead of figures."""
        common = self._common(case)
        say(f"{case.trainer} {case.bucket}: {case.plan}")
        try:
            return common | self._measured(case)
        except FAILURES as error:
            return common | {"error": in_a_line(error)}

    def _measured(self, case: Case) -> dict[str, Any]:
        arguments = self._arguments
        with tempfile.TemporaryDirectory() as folder:
            steps = self._steps(case, Path(folder), arguments.warmup + arguments.steps)
            trial = run_trial(steps, self._device, arguments.warmup)
            found = figures(trial)
            if arguments.profile and self._device.type == "cuda":
                steps = self._steps(case, Path(folder), PROFILED_STEPS)
                found |= profiled(steps, self._device, arguments.profile_folder, name_of(case))
        return found

    def _steps(self, case: Case, folder: Path, count: int) -> Iterator[Step]:
        if case.trainer == STOCK:
            return stock_steps(case, self._transformer, self._parameters, self._device, count)
        if self._model is None or self._model.plan != case.plan:
            torch.compiler.reset()
            self._model = None  # one that fails halfway has changed the transformer's blocks: the old one is of no use any more
            self._model = VelocityModel(self._transformer, case.plan)
        settings = TrainConfig(steps=count, warmup_steps=0)
        return random_steps(self._model, self._parameters, case.bucket, settings, folder)

    def _common(self, case: Case) -> dict[str, Any]:
        predicted = self._predicted(case) if self._device.type == "cuda" and case.trainer != STOCK else None
        told = {"trainer": case.trainer, "memory_cap_gib": case.cap_gib, "predicted": predicted}
        return about("train_step", case.bucket, case.plan, self._arguments) | told

    def _predicted(self, case: Case) -> dict[str, float]:
        size = ModelSize.of(self._dimensions)
        adapter = AdapterSize(adapter_parameters(_adapter(self._arguments.rank), size), 8, averaged=False)
        work = Workload(size, case.bucket, 1, 1, adapter, None)
        told = forecast(case.plan, work, card_of(self._device))
        step = dict(told.footprint.moments)["training"]
        return {"step_seconds": told.seconds, "allocated_gib": step, "pinned_gib": told.footprint.pinned}


def name_of(case: Case) -> str:
    """Of a file about the case."""
    plan = case.plan
    name = f"{case.bucket}-{plan.precision}-{plan.attention}-{plan.checkpointing}-{plan.block_swap}"
    return name.replace(":", "_").replace(",", "+")


def cap_memory(gib: float | None, device: torch.device) -> None:
    """For all of this process that comes after."""
    if gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(gib / total)


def about(benchmark: str, bucket: Bucket, plan: Plan, arguments: argparse.Namespace, world: int = 1) -> dict[str, Any]:
    """The fields that every line of a step has: what ran, and on what."""
    return {
        "benchmark": benchmark,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "world_size": world,
        "frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
        "rank": arguments.rank,
        "layers": arguments.layers,
        "plan": asdict(plan),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers", "peft")},
    }


def figures(trial: Trial) -> dict[str, Any]:
    """The measured fields of a line."""
    timed = trial.seconds
    return {
        "step_seconds": {"min": min(timed), "median": statistics.median(timed), "max": max(timed)},
        "first_step_seconds": trial.first_seconds,
        "steps": len(timed),
        "peak_gib": trial.reserved_gib,
        "allocated_gib": trial.allocated_gib,
        "tokens_per_second": trial.tokens / statistics.median(timed),
        "finite": bool(torch.isfinite(torch.tensor(trial.losses)).all()),
        "losses": [round(loss, 6) for loss in trial.losses],
    }


def attach(trainer: str, transformer: MochiTransformer3DModel, rank: int) -> dict[str, torch.nn.Parameter]:
    """Joint attention in both; the suffix list a diffusers user would write also hits the caption pooler."""
    if trainer != STOCK:
        return lora.attach(transformer, _adapter(rank), seed=0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), lora.TRAINED)
    return lora.trainable(transformer)


def _adapter(rank: int) -> AdapterConfig:
    return AdapterConfig(rank=rank, alpha=rank)


def stock_steps(
    case: Case,
    transformer: MochiTransformer3DModel,
    parameters: dict[str, torch.nn.Parameter],
    device: torch.device,
    count: int,
) -> Iterator[Step]:
    """diffusers + PEFT as a user would write it; the batch stands ready on the device."""
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

    yield from repeat(step, count)


def append(path: Path, line: dict[str, Any]) -> None:
    """Print a line and put it on disk now: a call that is killed loses the case in progress alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    say(json.dumps(line))


def in_a_line(error: Exception) -> str:
    """Its kind, and the first line of what it says: torch goes on with a page of advice."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def say(text: str) -> None:
    """Progress, at once even into a pipe."""
    print(text, flush=True)


def model_of(case: Case) -> tuple[object, ...]:
    """Cases that can share a transformer. Swapped weights are placed for good, so such a plan has one of its own."""
    return case.trainer, case.plan.precision, case.plan if case.plan.block_swap else None, case.cap_gib


def _plan(text: str, device: torch.device) -> Plan:
    """`precision=fp8,checkpointing=attention_saved:36,none,compile=true`: a comma without `=` after it belongs to the value."""
    words: dict[str, str] = {}
    name = ""
    for part in text.split(","):
        key, equals, value = part.partition("=")
        name = key if equals else name
        words[name] = value if equals else f"{words[name]},{part}"
    return _plan_of(words, device)


def _plan_of(words: dict[str, Any], device: torch.device) -> Plan:
    """Raises ValueError for a name that a plan does not have."""
    if strangers := words.keys() - {field.name for field in fields(Plan)}:
        raise ValueError(
            f"{', '.join(sorted(strangers))}: no part of a plan; they are {', '.join(f.name for f in fields(Plan))}"
        )
    basis: dict[str, Any] = (
        {"precision": "bf16", "attention": "auto", "checkpointing": "full"} | words | {"device": device.type}
    )
    checkpointing_runs(basis["checkpointing"])
    for name in ("compile", "cpu_offload"):
        basis[name] = str(basis.get(name, False)).lower() == "true"
    basis["block_swap"] = int(basis.get("block_swap", 0))
    return Plan(**basis)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, RESULTS / "train_step.jsonl")
    told = "instead: every choice against eager bf16, on a few blocks of full width (full), mochi-tiny (tiny), or both"
    parser.add_argument("--errors", nargs="?", choices=("full", "tiny", "both"), const="both", help=told)
    parser.add_argument("--errors-output", type=Path, default=RESULTS / "plan_errors.jsonl")
    return parser.parse_args()


def argument_parser(description: str | None, output: Path) -> argparse.ArgumentParser:
    """What every benchmark of a step is asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[37])
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--plan", action="append", default=[], metavar="PART=VALUE,...", help="may be given several times")
    parser.add_argument("--plans", type=Path, nargs="+", default=[], metavar="FILE", help="JSON lines, one plan each")
    parser.add_argument("--stock", action="store_true", help="also stock diffusers + PEFT, in the same call")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--memory-cap-gib", type=float, help="torch.cuda.set_per_process_memory_fraction for the whole run")
    parser.add_argument("--profile", action="store_true", help="then a few more steps: GPU idle share, host waits, top kernels")
    parser.add_argument("--profile-folder", type=Path, default=Path("profiles"), help="where the tables of kernels go")
    parser.add_argument("--layers", type=int, default=48, help="fewer to try it out")
    parser.add_argument("--heads", type=int, default=24, help="fewer to try it out")
    parser.add_argument("--output", type=Path, default=output)
    return parser


if __name__ == "__main__":
    main()

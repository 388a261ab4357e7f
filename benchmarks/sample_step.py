"""Seconds and memory of one guided denoising step of the full-size Mochi with random weights, one JSON line per case.

    python benchmarks/sample_step.py --frames 37 163 --plan precision=fp8,attention=flash4,compile=true --guidance both
    python benchmarks/sample_step.py --frames 37 --adapter attached fused none --stock --profile
    python benchmarks/sample_step.py --frames 163 --memory-cap-gib 23 --whole

A step is the product's own: both velocities, guidance, Euler update. `--stock` adds the yardstick: diffusers' model and
processor, one batch of both prompts, latents in bf16, its scheduler, a PEFT adapter in the model's dtype. `fused` puts the
adapter into the weights first. `--whole` makes one video instead, from prompt embeddings to mp4, under the plan that the engine
chooses for what is free (T5 is not loaded: `sample` drops it before anything else is). Cases of one model share it.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler
from peft.tuners.lora import LoraLayer
from train_step import GIB, RESULTS, STOCK, Bench, Case, about, append, argument_parser, cap_memory, run_cases, say
from train_step import cases as training_cases
from train_step import model_of as model_of_training

from mochi_lora.commands.workloads import film_work
from mochi_lora.config.engine import EngineConfig
from mochi_lora.config.schedule import linear_quadratic_schedule
from mochi_lora.config.schema import Config, SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.cards import card_of
from mochi_lora.engine.footprint import predict_memory
from mochi_lora.engine.pace import seconds_per_guided_step
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import compute_dtype
from mochi_lora.engine.resolve import resolve_plan
from mochi_lora.engine.swap import home_of
from mochi_lora.engine.workload import Films, ModelSize, Workload
from mochi_lora.inference.generate import condition, conditions
from mochi_lora.inference.live import LiveSampler
from mochi_lora.inference.sampler import draw_noise, sample_latents
from mochi_lora.inference.video import write_mp4
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import random_transformer
from mochi_lora.spec import TEXT_TOKENS as MOST_TOKENS
from mochi_lora.spec import Bucket
from mochi_lora.training.trial import TEXT_TOKENS, Step

GUIDANCE: dict[str, tuple[Literal["one", "two"], ...]] = {"one_batch": ("one",), "two_passes": ("two",), "both": ("two", "one")}
_SCALE, _STEPS = 6.0, 64
_PARTS = ("denoising", "decoding", "writing")


@dataclass(frozen=True)
class SampleCase(Case):
    """One line of the results; the passes of a step are the plan's."""

    adapter: str  # attached, fused, none


def main() -> None:
    """Run every case; one that fails is a line with its error, and the next one starts."""
    arguments = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.whole:
        for frames in arguments.frames:
            append(arguments.output, whole(arguments, Bucket(frames, arguments.height, arguments.width), device))
        return
    run_cases(SampleBench, cases(arguments, device), _model_of, arguments, device)


def cases(arguments: argparse.Namespace, device: torch.device) -> list[SampleCase]:
    """Those of one model next to each other. Stock has one form: a batch of both prompts, its adapter beside the weights."""
    found = []
    for case in training_cases(arguments, device):
        stock = case.trainer == STOCK
        for adapter in ["attached"] if stock else arguments.adapter:
            for passes in GUIDANCE["one_batch" if stock else arguments.guidance]:
                plan = replace(case.plan, guidance_passes=passes)
                found.append(SampleCase(case.trainer, case.bucket, plan, case.cap_gib, adapter))
    models = list(dict.fromkeys(map(_model_of, found)))
    return sorted(found, key=lambda case: models.index(_model_of(case)))


class SampleBench(Bench):
    """A transformer with its adapter, or without one, and the cases that run on it."""

    def __init__(self, arguments: argparse.Namespace, case: SampleCase, device: torch.device) -> None:
        super().__init__(arguments, case, device)
        self._transformer.eval()
        if case.adapter == "none":
            self._transformer.delete_adapters(list(self._transformer.peft_config))
        if case.adapter == "fused":
            for layer in self._transformer.modules():
                if isinstance(layer, LoraLayer):
                    layer.merge()

    def _measured(self, case: Case) -> dict[str, Any]:
        """Every case of one size starts from the same noise: what differs in the mean square is rounding."""
        found = super()._measured(case)
        return found | {"latents_mean_square": found.pop("losses")[-1]}

    def _steps(self, case: Case, folder: Path, count: int) -> Iterator[Step]:  # noqa: ARG002 - nothing is cached on disk
        latents = draw_noise(0, (1, *case.bucket.latent_shape)).to(self._device)
        prompt, null = _prompts(self._transformer.config.text_embed_dim)
        if case.trainer == STOCK:
            self._transformer.to(compute_dtype(case.plan.precision))  # what we keep in float32 as well
            return repeat(self._stock_step(latents, prompt), count)
        if self._model is None or self._model.plan != case.plan:
            torch.compiler.reset()
            self._model = VelocityModel(self._transformer, case.plan).eval()
        model, sigmas = self._model, linear_quadratic_schedule(_STEPS)[:2]
        told, untold = condition(model, prompt), condition(model, null)
        both = conditions(model, prompt, null) if case.plan.guidance_passes == "one" else None

        def step() -> tuple[torch.Tensor, int]:
            after = sample_latents(told, untold, latents, sigmas, [_SCALE], both=both)
            return after.square().mean(), 2 * case.bucket.tokens

        return repeat(step, count)

    def _stock_step(self, latents: torch.Tensor, prompt: TextEmbedding) -> Step:
        """The loop body of `MochiPipeline` (diffusers 0.42.1)."""
        model, device, dtype = self._transformer, self._device, self._transformer.dtype
        low, tokens = latents.to(dtype), latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
        text = torch.zeros(2, MOST_TOKENS, model.config.text_embed_dim, device=device, dtype=dtype)
        text[1, : prompt.length] = prompt.tokens.to(device, dtype)
        mask = torch.arange(MOST_TOKENS, device=device) < torch.tensor([[1], [prompt.length]], device=device)
        scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)

        @torch.no_grad()
        def step() -> tuple[torch.Tensor, int]:
            scheduler.set_timesteps(sigmas=linear_quadratic_schedule(_STEPS)[:-1], device=device)  # each step is the first
            time_now = scheduler.timesteps[0]
            velocity = model(torch.cat([low] * 2), text, time_now.expand(2).to(dtype), mask, return_dict=False)[0].float()
            null, told = velocity.chunk(2)
            after = scheduler.step(null + _SCALE * (told - null), time_now, low.float(), return_dict=False)[0].to(dtype)
            return after.float().square().mean(), 2 * tokens

        return step

    def _common(self, case: Case) -> dict[str, Any]:
        assert isinstance(case, SampleCase)
        predicted = self._predicted(case) if self._device.type == "cuda" and case.trainer != STOCK else None
        told = {"sampler": case.trainer, "adapter": case.adapter, "memory_cap_gib": case.cap_gib, "predicted": predicted}
        return about("sample_step", case.bucket, case.plan, self._arguments) | told

    def _predicted(self, case: Case) -> dict[str, float]:
        films = Films(case.bucket, _STEPS, guided=True, decoding_gib=0.0)
        work = Workload(ModelSize.of(self._dimensions), case.bucket, 1, 1, None, films)
        denoising = dict(predict_memory(case.plan, work).moments)["denoising videos"]
        return {
            "step_seconds": seconds_per_guided_step(case.plan, work, card_of(self._device)),
            "allocated_gib": denoising,
        }


def whole(arguments: argparse.Namespace, bucket: Bucket, device: torch.device) -> dict[str, Any]:
    """One video as `sample` makes it, of a few denoising steps: seconds of each part, and the worst memory of all."""
    cap_memory(arguments.memory_cap_gib, device)
    dimensions = {"num_layers": arguments.layers, "num_attention_heads": arguments.heads}
    shape = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    sample = SampleConfig(**shape, steps=max(2, arguments.steps))
    work = Workload(ModelSize.of(dimensions), bucket, 1, 1, None, film_work(Config(sample=sample)))
    plan = resolve_plan(EngineConfig(), work).plan
    say(f"whole {bucket}: {plan}")
    told = about("sample_step", bucket, plan, arguments)
    told |= {"sampler": "mochi-lora, embeddings to mp4", "adapter": "none", "memory_cap_gib": arguments.memory_cap_gib}
    try:
        return told | _filmed(arguments, sample, plan, dimensions, device)
    except RuntimeError as error:  # out of memory is one
        return told | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _filmed(
    arguments: argparse.Namespace, sample: SampleConfig, plan: Plan, dimensions: dict[str, int], device: torch.device
) -> dict[str, Any]:
    home = partial(home_of, depth=arguments.layers, plan=plan) if plan.block_swap else None
    transformer = random_transformer(dimensions, device=device, precision=plan.precision, home=home)
    small = {"decoder_block_out_channels": (arguments.channels,) * 4} if arguments.channels else {}
    vae = MochiVae(AutoencoderKLMochi(**small).eval().to("cpu" if plan.cpu_offload else device), precision="bf16")
    sampler = LiveSampler(VelocityModel(transformer, plan), vae, device=device, offload=plan.cpu_offload)
    prompt, null = _prompts(transformer.config.text_embed_dim)
    marks, steps = [time.perf_counter()], []
    latents = sampler.latents(prompt, null, sample, 0, (), on_step=lambda *_: steps.append(_waited(device)))
    marks.append(_waited(device))
    frames = sampler.frames(latents)
    marks.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        write_mp4(Path(folder) / "video.mp4", frames)
    marks.append(time.perf_counter())
    cuda = device.type == "cuda"
    return {
        "step_seconds": {"first": steps[0] - marks[0], "last": steps[-1] - steps[-2]},
        "steps": sample.steps,
        "part_seconds": {part: until - since for part, (since, until) in zip(_PARTS, pairwise(marks), strict=True)},
        "peak_gib": torch.cuda.max_memory_reserved(device) / GIB if cuda else None,
        "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB if cuda else None,
        "finite": bool(torch.isfinite(latents).all()),
    }


def _waited(device: torch.device) -> float:
    """Now, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _prompts(width: int) -> tuple[TextEmbedding, TextEmbedding]:
    """A prompt of the length that training steps are measured at, and the null prompt."""
    draw = torch.Generator().manual_seed(0)
    return TextEmbedding(torch.randn(TEXT_TOKENS[0], width, generator=draw)), TextEmbedding(torch.zeros(0, width))


def _model_of(case: SampleCase) -> tuple[object, ...]:
    return *model_of_training(case), case.adapter


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, RESULTS / "sample_step.jsonl")
    parser.add_argument("--guidance", choices=tuple(GUIDANCE), default="both", help="one pass over both prompts, or two")
    parser.add_argument("--adapter", nargs="+", choices=("attached", "fused", "none"), default=["attached"])
    parser.add_argument("--whole", action="store_true", help="instead: one video of --steps steps, embeddings to mp4")
    parser.add_argument("--channels", type=int, help="with --whole: width of the VAE's levels, to try it out")
    arguments = parser.parse_args()
    arguments.plan = arguments.plan or ([] if arguments.plans else ["checkpointing=none"])
    return arguments


if __name__ == "__main__":
    main()

"""Seconds and memory of one guided denoising step of the full-size Mochi with random weights, one JSON line per case.

    python benchmarks/sample_step.py --frames 37 163 --plan precision=fp8,attention=flash4,compile=true --guidance both
    python benchmarks/sample_step.py --frames 37 --adapter attached fused none --stock --profile
    python benchmarks/sample_step.py --frames 163 --memory-cap-gib 23 --whole

A step is the product's own: both velocities, guidance, Euler update. `--stock` adds the yardstick: diffusers' model and
processor, one batch of both prompts, latents in bf16, its scheduler, a PEFT adapter in the model's dtype. `fused` puts the
adapter into the weights first. `--whole` makes one video instead, text to mp4 (`whole_video.py`), under the plan that the
engine chooses for what is free, or under --plan. Cases of one model share it.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
import whole_video
from diffusers import FlowMatchEulerDiscreteScheduler
from peft.tuners.lora import LoraLayer
from train_step import RESULTS, STOCK, Bench, Case, about, append, argument_parser, run_cases
from train_step import cases as training_cases
from train_step import model_of as model_of_training

from mochi_lora.config.schedule import linear_quadratic_schedule
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.allocator import expand_segments
from mochi_lora.engine.precision import compute_dtype
from mochi_lora.inference.generate import condition, conditions
from mochi_lora.inference.sampler import draw_noise, sample_latents
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.planning.cards import card_of
from mochi_lora.planning.footprint import predict_memory
from mochi_lora.planning.pace import seconds_per_guided_step
from mochi_lora.planning.workload import Films, ModelSize, Workload
from mochi_lora.spec import TEXT_TOKENS as MOST_TOKENS
from mochi_lora.spec import Bucket
from mochi_lora.training.trial import TEXT_TOKENS, Step

GUIDANCE: dict[str, tuple[Literal["one", "two"], ...]] = {"one_batch": ("one",), "two_passes": ("two",), "both": ("two", "one")}
_SCALE, _STEPS = 6.0, 64


@dataclass(frozen=True)
class SampleCase(Case):
    """One line of the results; the passes of a step are the plan's."""

    adapter: str  # attached, fused, none


def main() -> None:
    """Run every case; one that fails is a line with its error, and the next one starts."""
    expand_segments()
    arguments = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.whole:
        for line in whole_video.lines(arguments, device):
            append(arguments.output, line)
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
        if case.trainer == STOCK:
            latents = draw_noise(0, (1, *case.bucket.latent_shape)).to(self._device)
            prompt, _ = _prompts(self._transformer.config.text_embed_dim)
            self._transformer.to(compute_dtype(case.plan.precision))  # what we keep in float32 as well
            return repeat(self._stock_step(latents, prompt), count)
        if self._model is None or self._model.plan != case.plan:
            torch.compiler.reset()
            self._model = None  # as in `Bench`
            self._model = VelocityModel(self._transformer, case.plan).eval()
        return repeat(guided_step(self._model, case.bucket), count)

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


def guided_step(model: VelocityModel, bucket: Bucket) -> Step:
    """The product's own, from the same noise each time: both velocities, guidance, Euler update."""
    latents = draw_noise(0, (1, *bucket.latent_shape)).to(model.device)
    prompt, null = _prompts(model.transformer.config.text_embed_dim)
    sigmas = linear_quadratic_schedule(_STEPS)[:2]
    told, untold = condition(model, prompt), condition(model, null)
    both = conditions(model, prompt, null) if model.plan.guidance_passes == "one" else None

    def step() -> tuple[torch.Tensor, int]:
        after = sample_latents(told, untold, latents, sigmas, [_SCALE], both=both)
        return after.square().mean(), 2 * bucket.tokens

    return step


def _prompts(width: int) -> tuple[TextEmbedding, TextEmbedding]:
    """A prompt of the length that training steps are measured at, and the null prompt."""
    draw = torch.Generator().manual_seed(0)
    return TextEmbedding(torch.randn(TEXT_TOKENS[0], width, generator=draw)), TextEmbedding(torch.zeros(0, width))


def _model_of(case: SampleCase) -> tuple[object, ...]:
    return *model_of_training(case), case.adapter


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, RESULTS / "sample_step.jsonl")
    parser.add_argument("--guidance", choices=tuple(GUIDANCE), help="one pass over both prompts, or two (default both)")
    parser.add_argument("--adapter", nargs="+", choices=("attached", "fused", "none"), default=["attached"])
    parser.add_argument("--whole", action="store_true", help="instead: one video of --steps steps, text to mp4")
    parser.add_argument("--channels", type=int, help="with --whole: width of the VAE's levels, to try it out")
    parser.add_argument("--text-width", type=int, default=whole_video.T5_WIDTH, help="with --whole: T5's, to try it out")
    arguments = parser.parse_args()
    if arguments.whole:
        _refuse_what_a_video_has_not(parser, arguments)
    else:
        arguments.guidance = arguments.guidance or "both"
        arguments.plan = arguments.plan or ([] if arguments.plans else ["checkpointing=none"])
    return arguments


def _refuse_what_a_video_has_not(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if "fused" in arguments.adapter:
        parser.error("--whole with --adapter fused: a video is made with an adapter beside the weights; give attached or none")
    if arguments.guidance:
        parser.error("--whole with --guidance: the passes are the plan's; give --plan ...,guidance_passes=one")
    if arguments.stock or arguments.profile:
        parser.error("--whole with --stock or --profile: they are for single steps; leave them out")


if __name__ == "__main__":
    main()

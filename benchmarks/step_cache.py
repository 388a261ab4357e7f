"""What `sample.step_cache` spares and costs, on the trained mochi-tiny: a JSON line per threshold, and the table's source.

    python benchmarks/step_cache.py
    python benchmarks/step_cache.py --prompts 2 --steps 8 --thresholds 0.1 --fewer 4 --output lines.jsonl

Held-out sentences of the drawn world, the same seeds each time; the exact sampler at --steps is what everything is held
against. `--fewer` is the other way to spare work: the exact sampler with that many steps. It is mochi-tiny: the polynomial
that expects changes was fitted on the real Mochi by its authors, so of the real model this says nothing.
"""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_step import RESULTS, append, say

from mochi_lora.config.schedule import linear_quadratic_schedule
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.plan import Plan
from mochi_lora.inference.generate import condition, render
from mochi_lora.inference.prompts import embed_prompts
from mochi_lora.inference.sampler import draw_noise, sample_latents
from mochi_lora.model.step_cache import StepCache
from mochi_lora.model.text import TextEncoder
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import load_transformer
from mochi_lora.spec import Bucket
from mochi_lora.tiny.exam import exam_scenes, exam_sentences, marks
from mochi_lora.tiny.pretrained import WEIGHTS
from mochi_lora.tiny.world import FRAMES, HEIGHT, WIDTH

_BUCKET = Bucket(FRAMES, HEIGHT, WIDTH)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Made:
    """All clips of one setting."""

    latents: list[torch.Tensor]
    clips: np.ndarray  # uint8 [N, F, H, W, 3]
    spared: float  # share of the passes through the blocks that were not run


class Sampler:
    """mochi-tiny in float32 on the CPU, and the sentences."""

    def __init__(self, prompts: Sequence[str], guidance: float) -> None:
        embeddings = embed_prompts(TextEncoder.load(WEIGHTS, device=_CPU, precision="fp32"), [*prompts, ""]).embeddings
        self._prompts: list[TextEmbedding] = [embeddings[prompt] for prompt in prompts]
        self._null = embeddings[""]
        transformer = load_transformer(WEIGHTS / "transformer", device=_CPU, precision="fp32").transformer
        self._model = VelocityModel(transformer, Plan("cpu", "fp32", "auto", "none")).eval()
        self._vae = MochiVae.load(WEIGHTS / "vae", device=_CPU, precision="fp32")
        self._guidance = guidance

    def make(self, steps: int, threshold: float) -> Made:
        """Clip i starts from noise i; threshold 0 is the exact sampler."""
        sigmas, spared, latents = linear_quadratic_schedule(steps), 0, []
        for seed, prompt in enumerate(self._prompts):
            caches = [StepCache(threshold, steps) if threshold else None for _ in range(2)]
            texts = zip((prompt, self._null), caches, strict=True)
            told, untold = (condition(self._model, text, cache) for text, cache in texts)
            noise = draw_noise(seed, (1, *_BUCKET.latent_shape))
            latents.append(sample_latents(told, untold, noise, sigmas, [self._guidance] * steps)[0])
            spared += sum(cache.reused for cache in caches if cache)
        clips = np.stack([render(self._vae, found) for found in latents])
        return Made(latents, clips, spared / (2 * steps * len(latents)))


def main() -> None:
    """The exact sampler, every threshold, and the exact sampler with fewer steps."""
    arguments = parsed()
    scenes = exam_scenes(arguments.prompts)
    sampler = Sampler(exam_sentences(scenes), arguments.guidance)
    exact = sampler.make(arguments.steps, 0.0)
    cases = [(arguments.steps, 0.0), *((arguments.steps, threshold) for threshold in arguments.thresholds)]
    for steps, threshold in [*cases, *((fewer, 0.0) for fewer in arguments.fewer)]:
        say(f"{steps} steps, step_cache {threshold:g}")
        made = exact if (steps, threshold) == cases[0] else sampler.make(steps, threshold)
        line = about(len(scenes)) | {"steps": steps, "threshold": threshold, "reference_steps": arguments.steps}
        line |= {"guidance": arguments.guidance} | against(exact, made, steps, arguments.steps)
        append(arguments.output, line | marks(made.clips, scenes))


def against(exact: Made, made: Made, steps: int, reference_steps: int) -> dict[str, Any]:
    """`spared` of the reference's passes, relative errors of latents, and PSNR of frames in dB, None where they are equal."""
    pairs = zip(exact.latents, made.latents, strict=True)
    errors = [float((found - true).norm() / true.norm()) for true, found in pairs]
    squares = (exact.clips.astype(np.float64) - made.clips).reshape(len(made.clips), -1)
    psnr = [float(10 * np.log10(255**2 / square)) for square in np.square(squares).mean(1) if square]
    return {
        "spared": 1 - (1 - made.spared) * steps / reference_steps,
        "latent_error": float(np.mean(errors)),
        "worst_latent_error": max(errors),
        "psnr": float(np.mean(psnr)) if psnr else None,
        "worst_psnr": min(psnr, default=None),
    }


def about(prompts: int) -> dict[str, Any]:
    """The fields of every line."""
    return {
        "benchmark": "step_cache",
        "model": "mochi-tiny",
        "gpu": "none (CPU)",
        "frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "prompts": prompts,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers")},
    }


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24, help="held-out sentences")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.03, 0.06, 0.09, 0.2])
    parser.add_argument("--fewer", type=int, nargs="*", default=[32, 16], help="steps of the exact sampler, for comparison")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_cache.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()

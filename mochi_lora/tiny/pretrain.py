"""`python -m mochi_lora.tiny.pretrain FOLDER`: make mochi-tiny again, from nothing, on one GPU.

Two stages, VAE and transformer with text encoder. Each call trains for at most eight minutes a stage, saves as it goes, and
says what to do next; call it again until it prints its marks and writes the model. Nothing is downloaded: the world is drawn.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline

from mochi_lora.console import console, errors
from mochi_lora.engine.precision import weight_dtype
from mochi_lora.errors import UserError
from mochi_lora.tiny.architecture import VAE
from mochi_lora.tiny.exam import draw, exam_scenes, exam_sentences, marks
from mochi_lora.tiny.transformer_stage import Drawer, train_transformer
from mochi_lora.tiny.vae_stage import train_vae
from mochi_lora.tiny.world import TRIGGER

_EXAMINED = 256
_STEPS, _GUIDANCE = 24, 4.0
_UNFINISHED = 3  # exit status


def main(argv: Sequence[str] | None = None) -> int:
    """One call; exit status 0 when the model is written, 3 when another call is needed, 1 for what a person must mend."""
    parser = argparse.ArgumentParser(prog="python -m mochi_lora.tiny.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the stages' states, and of the model when it is done")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a look at the code (default cuda)")
    chosen = parser.parse_args(argv)
    try:
        return _go_on(chosen.folder, torch.device(chosen.device), chosen.seed)
    except UserError as error:
        errors.print(f"error: {error}", markup=False)
        return 1


def _go_on(folder: Path, device: torch.device, seed: int) -> int:
    vae = train_vae(folder, device, seed)
    drawer = train_transformer(folder, vae, seed) if vae is not None else None
    if vae is None or drawer is None or not drawer.done:
        console.print("not done: the same command goes on from here", markup=False)
        return _UNFINISHED
    report(drawer, vae, _EXAMINED)
    console.print(f"model: {write_model(folder / 'mochi-tiny', drawer, vae)}", markup=False)
    return 0


def report(drawer: Drawer, vae: AutoencoderKLMochi, count: int) -> None:
    """Print how well held-out sentences are drawn, without and with a trigger that means nothing yet."""
    scenes = exam_scenes(count)
    sentences = exam_sentences(scenes)
    for name, told in (("plain", sentences), ("trigger", [f"{TRIGGER}, {sentence}" for sentence in sentences])):
        found = marks(draw(drawer, vae, told, steps=_STEPS, guidance=_GUIDANCE), scenes)
        console.print(f"{name}: " + "  ".join(f"{word} {value:.3f}" for word, value in found.items()), markup=False)


def write_model(folder: Path, drawer: Drawer, vae: AutoencoderKLMochi) -> Path:
    """The whole model in diffusers layout: fp16, and float32 for what Genmo keeps so. Moves `drawer` to the CPU.

    T5 stays float32, 0.4 MB: stock pipelines open transformer and VAE in float32, but T5 as stored, and then do not fit.
    """
    trained = AutoencoderKLMochi(**VAE, latents_mean=list(drawer.stats.mean), latents_std=list(drawer.stats.std))
    trained.load_state_dict({name: weight.cpu() for name, weight in vae.state_dict().items()})
    transformer = drawer.model.transformer.cpu()
    for name, weight in transformer.named_parameters():
        kept = weight_dtype(name, "bf16") == torch.float32
        weight.data = weight.data.to(torch.float32 if kept else torch.float16)
    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, invert_sigmas=True),
        vae=torch.nn.Module.to(trained, torch.float16),  # diffusers' own `to` warns about modules kept in fp32
        text_encoder=drawer.encoder.cpu().eval(),
        tokenizer=drawer.tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())

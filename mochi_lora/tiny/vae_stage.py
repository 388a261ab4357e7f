"""Stage 1 of pretraining: the VAE learns to draw the world back, in every line and colour.

It must not be what keeps a new style from showing, so half of its clips are outlines in random colours: it learns thin
lines, and nobody learns chalk.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiChunkedGroupNorm3D

from mochi_lora.console import console
from mochi_lora.model.vae_upstream import mend
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.architecture import new_vae
from mochi_lora.tiny.judge import accuracy, judge
from mochi_lora.tiny.render import SceneBatch, render_batch, render_outlines, scene_batch
from mochi_lora.tiny.scenery import Style
from mochi_lora.tiny.stage import Budget, Stage
from mochi_lora.tiny.style import style_score
from mochi_lora.tiny.world import FRAMES, draw_scene

# Drawn and unknown log-variance, weights of the loss. A free log-variance starts at 0, and unit noise drowns means that
# are still small: noise of fixed size, and the log-variance told to be that.
NOISE = 0.1
_ABSOLUTE, _VARIANCE, _SHRINK = 0.2, 1e-3, 1e-3
_CHUNK = 500  # scenes rendered at once: 6 MB each
_POOL = 40_000  # clips, 0.46 MB each, on the GPU
_BUDGET = Budget(steps=5800, minutes=8.0, warmup=100, learning_rate=3e-3)
# From this step on: clips in a batch, frames of each. Pictures first: motion is learned on top of shapes, and costs more.
_PHASES = ((5400, 48, 25), (4100, 96, 13), (2100, 128, 7), (0, 256, 1))
_EXAMINED = 64  # held-out scenes


def train_vae(folder: Path, device: torch.device, seed: int = 0) -> AutoencoderKLMochi | None:
    """Go on with the stage for one call; the averaged VAE when it is done, None while it is not."""
    torch.manual_seed(seed)
    stage = Stage(folder / "vae.pt", {"vae": _quick(new_vae().to(device))}, betas=(0.9, 0.99), decay=0.999)
    vae = stage.modules["vae"]
    torch.manual_seed(seed + stage.step)
    if stage.step < _BUDGET.steps:
        pool = picture_pool(seed, scene_pool(seed, _POOL, device))

        def loss_of(step: int) -> torch.Tensor:
            batch, frames = next((batch, frames) for first, batch, frames in _PHASES if step >= first)
            return vae_loss(vae, draw_clips(pool, batch, frames, stream(seed, Purpose.WORLD, 2**33 + step)))

        stage.run(loss_of, _BUDGET)
    trained = stage.average["vae"]
    for style in ("base", "chalk"):
        told = "  ".join(f"{name} {value:.3f}" for name, value in examine_vae(trained, style).items())
        console.print(f"vae, step {stage.step}, {style}: {told}", markup=False)
    return trained if stage.step >= _BUDGET.steps else None


def scene_pool(seed: int, count: int, device: torch.device) -> SceneBatch:
    """Scenes 0 to `count` of the training side, ready to be rendered."""
    return scene_batch([draw_scene(seed, index, held_out=False) for index in range(count)], device)


def picture_pool(seed: int, scenes: SceneBatch) -> torch.Tensor:
    """uint8 [N, F, H, W, 3] on the scenes' device: the first half as mochi-tiny will see them, the others as outlines."""
    rng = stream(seed, Purpose.WORLD, 2**32)
    half = len(scenes) // 2
    parts = [render_batch(scenes.part(slice(start, min(start + _CHUNK, half))), "base") for start in range(0, half, _CHUNK)]
    parts += [render_outlines(scenes.part(slice(start, start + _CHUNK)), rng) for start in range(half, len(scenes), _CHUNK)]
    return torch.cat(parts)


def draw_clips(pool: torch.Tensor, batch: int, frames: int, rng: np.random.Generator) -> torch.Tensor:
    """Pixels [B, 3, F, H, W] float32 in [-1, 1]: runs of `frames` from random clips of the pool."""
    rows = torch.from_numpy(rng.integers(len(pool), size=batch)).to(pool.device)
    first = int(rng.integers(FRAMES - frames + 1))
    return to_pixels(pool[rows, first : first + frames])


def to_pixels(clips: torch.Tensor) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] -> float32 [B, 3, F, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def vae_loss(vae: AutoencoderKLMochi, pixels: torch.Tensor) -> torch.Tensor:
    """Squared and absolute error of the reconstruction, and the pulls on the posterior; pixels [B, 3, F, H, W]."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        moments, _ = vae.encoder(pixels)
        mean, logvar = moments.float().chunk(2, dim=1)
        decoded, _ = vae.decoder(mean + NOISE * torch.randn_like(mean))
    error = decoded.float() - pixels
    posterior = _VARIANCE * (logvar - 2 * np.log(NOISE)).square().mean() + _SHRINK * mean.square().mean()
    return error.square().mean() + _ABSOLUTE * error.abs().mean() + posterior


@torch.no_grad()
def examine_vae(vae: AutoencoderKLMochi, style: Style) -> dict[str, float]:
    """Held-out clips in `style`, there and back: PSNR in decibels, style score, and what the judge still recognises."""
    device = next(vae.parameters()).device
    scenes = [draw_scene(1, index, held_out=True) for index in range(_EXAMINED)]
    pixels = to_pixels(render_batch(scene_batch(scenes, device), style))
    with torch.autocast(device.type, torch.bfloat16, enabled=pixels.is_cuda):
        moments, _ = vae.encoder(pixels)
        decoded, _ = vae.decoder(moments.float().chunk(2, dim=1)[0])
    decoded = decoded.float().clamp(-1, 1)
    errors = (decoded - pixels).square().mean(dim=(1, 2, 3, 4))
    clips = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()
    found = {"psnr": float((10 * torch.log10(4 / errors)).mean())}
    found["style"] = float(np.mean([style_score(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]))
    answers = [accuracy(judge(clip), scene) for clip, scene in zip(clips, scenes, strict=True)]
    return found | {word: float(np.mean([answer[word] for answer in answers])) for word in answers[0]}


class _PatchConv3d(torch.nn.Module):
    """A convolution whose stride is its kernel, as a product of patches: cuDNN's gradient of it took a fifth of a step."""

    def __init__(self, weight: torch.nn.Parameter, bias: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias  # [C', C, e, s, s] and [C'], under the names they have in the convolution

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, C, F, H, W] -> [B, C', F/e, H/s, W/s]."""
        window = self.weight.shape[2:]
        for axis, size in zip((2, 4, 6), window, strict=True):
            hidden = hidden.unflatten(axis, (-1, size))
        patches = hidden.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return torch.nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


def _quick(vae: AutoencoderKLMochi) -> AutoencoderKLMochi:
    """The same function with fewer kernel launches; Genmo's frame dropping included, as everywhere in this project."""
    mend(vae)
    for module in vae.modules():
        if isinstance(module, MochiChunkedGroupNorm3D):
            module.chunk_size = 1 << 30  # frames at a time: 8 by default, hundreds of launches for a batch
    for block in vae.encoder.down_blocks:
        block.conv_in.conv = _PatchConv3d(block.conv_in.conv.weight, block.conv_in.conv.bias)
    return vae.requires_grad_(requires_grad=True).train()

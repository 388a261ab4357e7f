"""Can mochi-tiny draw? Held-out sentences to clips, judged against what they say."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKLMochi

from mochi_lora import spec
from mochi_lora.config.schedule import linear_quadratic_schedule
from mochi_lora.inference.sampler import draw_noise, sample_latents
from mochi_lora.model.transformer import TextBatch
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.judge import accuracy, judge
from mochi_lora.tiny.style import style_score
from mochi_lora.tiny.transformer_stage import Drawer, embed
from mochi_lora.tiny.world import FRAMES, HEIGHT, WIDTH, Scene, caption, draw_scene

_AT_ONCE = 64


def exam_scenes(count: int) -> list[Scene]:
    """Scenes of combinations mochi-tiny never saw."""
    return [draw_scene(1, index, held_out=True) for index in range(count)]


def exam_sentences(scenes: Sequence[Scene]) -> list[str]:
    """One plain sentence each, always the same."""
    return [caption(scene, stream(1, Purpose.WORLD, 2**32 + index)) for index, scene in enumerate(scenes)]


@torch.no_grad()
def draw(
    drawer: Drawer, vae: AutoencoderKLMochi, sentences: Sequence[str], *, steps: int, guidance: float, seed: int = 0
) -> np.ndarray:
    """Clips uint8 [N, F, H, W, 3], one per sentence, by the product's sampler; clip i starts from noise `seed` + i."""
    clips = []
    shape = spec.Bucket(FRAMES, HEIGHT, WIDTH).latent_shape
    sigmas, scales = linear_quadratic_schedule(steps), [guidance] * steps
    for start in range(0, len(sentences), _AT_ONCE):
        part = sentences[start : start + _AT_ONCE]
        text, null = _texts(drawer, part), _texts(drawer, [""] * len(part))
        noise = torch.stack([draw_noise(seed + start + index, shape) for index in range(len(part))]).to(drawer.model.device)

        def told(latents: torch.Tensor, sigma: torch.Tensor, text: TextBatch = text) -> torch.Tensor:
            return drawer.model(latents, sigma, text)

        def untold(latents: torch.Tensor, sigma: torch.Tensor, null: TextBatch = null) -> torch.Tensor:
            return drawer.model(latents, sigma, null)

        latents = drawer.stats.denormalise(sample_latents(told, untold, noise, sigmas, scales))
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=noise.is_cuda):
            decoded, _ = vae.decoder(latents)
        pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        clips.append(pixels.permute(0, 2, 3, 4, 1).cpu().numpy())
    return np.concatenate(clips)


def _texts(drawer: Drawer, sentences: Sequence[str]) -> TextBatch:
    ids = [found if text else [] for text, found in zip(sentences, drawer.tokenizer(list(sentences))["input_ids"], strict=True)]
    longest = max(1, *map(len, ids))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    return embed(drawer.encoder, tokens, torch.tensor([len(row) for row in ids]))


def marks(clips: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of clips in which each word of the scene came true, and the mean style score."""
    answers = [accuracy(judge(clip), scene) for clip, scene in zip(clips, scenes, strict=True)]
    found = {word: float(np.mean([answer[word] for answer in answers])) for word in answers[0]}
    found["style"] = float(np.mean([style_score(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]))
    return found

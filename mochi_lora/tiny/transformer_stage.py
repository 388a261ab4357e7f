"""Stage 2 of pretraining: transformer and text encoder learn, together, to draw what a sentence says.

The product's own objective and model: `VelocityModel`, uniform sigma, clean - noise, a tenth of the captions dropped.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLMochi
from transformers import T5EncoderModel, T5Tokenizer

from mochi_lora.engine.plan import Plan
from mochi_lora.model.flow import LatentStats, interpolate, velocity_loss, velocity_target
from mochi_lora.model.tiny import tiny_text_encoder, word_tokenizer
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.architecture import new_transformer
from mochi_lora.tiny.looks import LOOKS, Look
from mochi_lora.tiny.render import render_batch, scene_batch
from mochi_lora.tiny.sentences import pretraining_caption, vocabulary
from mochi_lora.tiny.stage import Budget, Stage
from mochi_lora.tiny.vae_stage import NOISE, to_pixels
from mochi_lora.tiny.world import draw_scene

_BUDGET = Budget(steps=7_500, minutes=8.0, warmup=300, learning_rate=1.2e-3)
_BATCH, _RUNS = 2048, 8  # samples; runs of neighbours in length among them
_SCENES, _SENTENCES = 48_000, 3
_ENCODED_AT_ONCE = 128
_NULL = 0.1  # share of captions dropped, for guidance


@dataclass(frozen=True)
class Lesson:
    """What the stage learns from: latents of rendered scenes, and sentences for each."""

    means: torch.Tensor  # [N, C, T, H, W] float32, raw VAE space
    stats: LatentStats  # of draws from the posterior
    tokens: torch.Tensor  # int64 [N, K, L] on the host, padded with 0
    lengths: torch.Tensor  # int64 [N, K] on the host


@torch.no_grad()
def prepare(vae: AutoencoderKLMochi, tokenizer: T5Tokenizer, seed: int, count: int) -> Lesson:
    """Scenes 0 to `count` of the training side, drawn, encoded and described; half of them wear a look."""
    device = next(vae.parameters()).device
    scenes = [draw_scene(seed, index, held_out=False) for index in range(count)]
    batch = scene_batch(scenes, device)
    looks = [_look_of(start // _ENCODED_AT_ONCE) for start in range(0, count, _ENCODED_AT_ONCE)]
    means = []
    for start, look in zip(range(0, count, _ENCODED_AT_ONCE), looks, strict=True):
        pixels = to_pixels(render_batch(batch.part(slice(start, start + _ENCODED_AT_ONCE)), look or "base"))
        with torch.autocast(device.type, torch.bfloat16, enabled=pixels.is_cuda):
            moments, _ = vae.encoder(pixels)
        means.append(moments.float().chunk(2, dim=1)[0])
    latents = torch.cat(means)
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3, 4))
    stats = LatentStats(tuple(mean.tolist()), tuple((variance + NOISE**2).sqrt().tolist()))
    rng = stream(seed, Purpose.WORLD, 2**34)
    worn = [look for look in looks for _ in range(_ENCODED_AT_ONCE)][:count]
    sentences = [
        pretraining_caption(scene, rng, look) for scene, look in zip(scenes, worn, strict=True) for _ in range(_SENTENCES)
    ]
    ids = tokenizer(sentences, verbose=False)["input_ids"]
    lengths = torch.tensor([len(row) for row in ids])
    tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, found in zip(tokens, ids, strict=True):
        row[: len(found)] = torch.tensor(found)
    return Lesson(latents, stats, tokens.unflatten(0, (count, _SENTENCES)), lengths.unflatten(0, (count, _SENTENCES)))


def _look_of(chunk: int) -> Look | None:
    """Every other chunk of scenes wears a look, in turn."""
    return LOOKS[chunk // 2 % len(LOOKS)] if chunk % 2 else None


def embed(encoder: T5EncoderModel, tokens: torch.Tensor, lengths: torch.Tensor) -> TextBatch:
    """T5 states of int64 `tokens` [B, L] (host), rows beyond `lengths` [B] zero; a length of 0 is the null prompt."""
    device = next(encoder.parameters()).device
    lengths = lengths.clamp(max=tokens.shape[1])
    mask = (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).to(device, non_blocking=True)
    # A row without any valid token would be all NaN: it attends to itself, and is zeroed afterwards.
    seen = mask | (torch.arange(tokens.shape[1], device=device) == 0)
    states = encoder(input_ids=tokens.to(device, non_blocking=True), attention_mask=seen.long())[0].float()
    return TextBatch(states * mask.unsqueeze(-1), tuple(lengths.tolist()))


def draw_rows(lengths: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch as clips, sentences and lengths (0 for a dropped caption), int64 [B] each; `lengths` [N, K] of all sentences.

    Every sentence is as likely as any other, but a batch has few lengths: attention is called once per length and layer, and
    the step waits for those calls to be launched (some 25 lengths in a batch drawn without care).
    """
    count = 4 * _BATCH
    rows, which = (torch.from_numpy(rng.integers(size, size=count)) for size in lengths.shape)
    found = lengths[rows, which] * torch.from_numpy(rng.random(count) >= _NULL)
    runs = torch.argsort(found, stable=True).view(4 * _RUNS, -1)
    taken = runs[np.sort(rng.choice(len(runs), _RUNS, replace=False))].flatten()
    return rows[taken], which[taken], found[taken]


def training_loss(model: VelocityModel, encoder: T5EncoderModel, lesson: Lesson, rng: np.random.Generator) -> torch.Tensor:
    """The flow-matching loss of one batch drawn from `lesson`: a scalar. Noise comes from torch's global generator."""
    device = lesson.means.device
    rows, which, lengths = draw_rows(lesson.lengths, rng)
    text = embed(encoder, lesson.tokens[rows, which, : int(lengths.max())], lengths)
    means = lesson.means[rows.to(device)]
    clean = lesson.stats.normalise(means + NOISE * torch.randn_like(means))
    noise, sigma = torch.randn_like(clean), torch.rand(len(rows), device=device)
    predicted = model(interpolate(clean, noise, sigma), sigma, text)
    return velocity_loss(predicted, velocity_target(clean, noise)).mean()


@dataclass(frozen=True)
class Drawer:
    """What the stage makes: all it takes from a sentence to normalised latents."""

    model: VelocityModel
    encoder: T5EncoderModel
    tokenizer: T5Tokenizer
    stats: LatentStats
    done: bool


def train_transformer(folder: Path, vae: AutoencoderKLMochi, seed: int = 0) -> Drawer:
    """Go on with the stage for one call; the averaged modules as they are now."""
    device = next(vae.parameters()).device
    # Not `auto`: captions of some 25 lengths make calls of ever new shapes, and cuDNN's attention, torch's first choice, plans
    # for each of them; a step took 0.9 s.
    plan = Plan("cuda", "bf16", "flash", "none") if device.type == "cuda" else Plan("cpu", "fp32", "auto", "none")
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(vocabulary())
    modules = {"transformer": new_transformer().to(device), "text_encoder": tiny_text_encoder(len(tokenizer)).to(device)}
    stage = Stage(folder / "transformer.pt", modules, betas=(0.9, 0.99), decay=0.999)
    lesson = prepare(vae, tokenizer, seed, _SCENES)
    model = VelocityModel(stage.modules["transformer"], plan)

    def loss_of(step: int) -> torch.Tensor:
        return training_loss(model, stage.modules["text_encoder"], lesson, stream(seed, Purpose.WORLD, 2**35 + step))

    torch.manual_seed(seed + stage.step)
    done = stage.run(loss_of, _BUDGET)
    averaged = VelocityModel(stage.average["transformer"], plan)
    return Drawer(averaged, stage.average["text_encoder"], tokenizer, lesson.stats, done)

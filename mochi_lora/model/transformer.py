"""The velocity model: latents, sigma and text in, velocity out. The one place that flips time.

Shape legend: B = samples, C = 12 channels, T = latent frames, H, W = latent cells, L = padded text tokens, D = T5 width.

The forward pass is our own composition of `MochiTransformer3DModel`'s parts (same arithmetic as diffusers 0.42.1
`transformer_mochi.py`, proven by golden data), because blocks must be wrapped in one place, valid text lengths must stay
on the host, and time must stay float32: stock rounds it to the latents' dtype (998 becomes 1000 in bf16).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from diffusers import MochiTransformer3DModel
from torch import nn

from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.attention import install_attention
from mochi_lora.engine.blocks import wrap_blocks
from mochi_lora.engine.checkpoints import RotaryTables
from mochi_lora.engine.joint_block import install_blocks
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import compute_dtype
from mochi_lora.model.step_cache import StepCache, after_blocks
from mochi_lora.parallel.context import ContextRanks
from mochi_lora.parallel.mesh import ALONE, Ranks

_TIME_SCALE = 1000.0


@dataclass(frozen=True)
class TextBatch:
    """Captions of a batch, padded to the longest; lengths stay on the host so that no kernel waits for them."""

    tokens: torch.Tensor  # [B, L, D] float32, L >= 1; rows beyond a sample's length are zero
    lengths: tuple[int, ...]  # valid tokens per sample; 0 is the null prompt

    @classmethod
    def collate(cls, embeddings: list[TextEmbedding]) -> "TextBatch":
        """Pad to the longest caption. At least one (masked) token: the text stream cannot be empty."""
        longest = max(1, *(embedding.length for embedding in embeddings))
        tokens = torch.zeros(len(embeddings), longest, embeddings[0].tokens.shape[1])
        for row, embedding in zip(tokens, embeddings, strict=True):
            row[: embedding.length] = embedding.tokens
        return cls(tokens, tuple(embedding.length for embedding in embeddings))

    def to(self, device: torch.device) -> "TextBatch":
        """The same text on `device`; the copy does not wait if the source is pinned."""
        return TextBatch(self.tokens.to(device, non_blocking=True), self.lengths)


def timestep_of(sigma: torch.Tensor) -> torch.Tensor:
    """What the transformer is told: (1 - sigma) * 1000 in float32, so 0 is pure noise and 1000 is data.

    Source: genmoai/mochi @0c86aeb `asymm_models_joint.py:645`.
    """
    assert sigma.dtype == torch.float32, f"sigma must be float32, got {sigma.dtype}"
    return (1.0 - sigma) * _TIME_SCALE


class VelocityModel(nn.Module):
    """`MochiTransformer3DModel` behind one call; the module that training wraps and sampling borrows."""

    def __init__(self, transformer: MochiTransformer3DModel, plan: Plan, ranks: Ranks = ALONE) -> None:
        """With context ranks, all of a group are called alike and return alike; each works on its part of the tokens."""
        assert (plan.context, plan.shard) == (ranks.layout.context, ranks.layout.shard), f"{plan}, but {ranks.layout}"
        super().__init__()
        self.transformer = transformer
        self.plan = plan
        self.ranks = ranks
        self._context = ContextRanks.of(ranks)
        install_attention(transformer, plan.attention, self._context)
        install_blocks(transformer.transformer_blocks)
        self._blocks = wrap_blocks(transformer.transformer_blocks, plan, ranks)
        self._rotary: tuple[tuple[object, ...], RotaryTables] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.proj_out.weight.device

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, text: TextBatch, caches: Sequence[StepCache] = ()
    ) -> torch.Tensor:
        """Velocity (clean - noise) of normalised `latents` [B, C, T, H, W] float32 at `sigma` [B] float32; float32.

        With `caches`, one a sample and not exact, the blocks may be spared; sampling alone has them.
        """
        assert latents.dtype == torch.float32, f"latents must be float32, got {latents.dtype}"
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=compute_dtype(self.plan.precision) == torch.bfloat16):
            return self._velocity(latents, timestep_of(sigma), text, caches).float()

    def _velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: TextBatch, caches: Sequence[StepCache]
    ) -> torch.Tensor:
        model = self.transformer
        batch, _, frames, height, width = latents.shape
        patch = model.config.patch_size
        conditioning, stream = self._condition(timestep, text)
        visual = latents.permute(0, 2, 1, 3, 4).flatten(0, 1)
        visual = model.patch_embed(visual).unflatten(0, (batch, frames)).flatten(1, 2)
        if self._context is not None:
            visual = visual[:, self._context.part(visual.shape[1])]
        rotary = self._rotary_tables(frames, height // patch, width // patch)
        stream = stream.to(visual.dtype)
        if caches:
            before = visual

            def run(samples: Sequence[int]) -> torch.Tensor:
                chosen = [torch.cat([given[row : row + 1] for row in samples]) for given in (before, stream, conditioning)]
                lengths = tuple(text.lengths[row] for row in samples)
                return self._run_blocks(chosen[0], chosen[1], chosen[2], lengths, rotary)

            self._blocks.fetch(0)
            indicator = model.transformer_blocks[0].norm1(before, conditioning)[0]
            visual = after_blocks(caches, before, indicator, run, self._context.mean if self._context else None)
        else:
            visual = self._run_blocks(visual, stream, conditioning, text.lengths, rotary)
        patches = model.proj_out(model.norm_out(visual, conditioning))
        if self._context is not None:
            patches = self._context.whole(patches)
        patches = patches.reshape(batch, frames, height // patch, width // patch, patch, patch, -1)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    def _run_blocks(
        self,
        visual: torch.Tensor,
        stream: torch.Tensor,
        conditioning: torch.Tensor,
        lengths: tuple[int, ...],
        rotary: RotaryTables,
    ) -> torch.Tensor:
        for block in self._blocks.calls:
            visual, stream = block(visual, stream, conditioning, lengths, rotary)
        return visual

    def _condition(self, timestep: torch.Tensor, text: TextBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditioning vector [B, width] and text stream [B, L, text width]."""
        embed = self.transformer.time_embed
        positions = torch.arange(text.tokens.shape[1])
        mask = positions < torch.tensor(text.lengths).unsqueeze(1)  # built on the host: no synchronisation
        mask = mask.to(text.tokens.device, non_blocking=True)
        time = embed.timestep_embedder(embed.time_proj(timestep))
        return time + embed.pooler(text.tokens, mask), embed.caption_proj(text.tokens)

    def _rotary_tables(self, frames: int, height: int, width: int) -> RotaryTables:
        """(cos, sin) [this rank's visual tokens, heads, head size / 2] float32: once for steps of one size."""
        frequencies = self.transformer.pos_frequencies
        if frequencies.requires_grad:  # a model trained whole
            return self._new_rotary_tables(frames, height, width)
        # Of the last size alone: at 163 frames the tables take half a GiB.
        size = (frames, height, width, frequencies.device, frequencies.data_ptr(), frequencies._version)
        if self._rotary is None or self._rotary[0] != size:
            self._rotary = (size, self._new_rotary_tables(frames, height, width))
        return self._rotary[1]

    def _new_rotary_tables(self, frames: int, height: int, width: int) -> RotaryTables:
        frequencies = self.transformer.pos_frequencies
        positions = self.transformer.rope._get_positions(frames, height, width, frequencies.device, torch.float32)
        if self._context is not None:
            positions = positions[self._context.part(positions.shape[0])]
        with torch.autocast(frequencies.device.type, enabled=False):
            angles = torch.einsum("nd,dhf->nhf", positions, frequencies.float())
        return angles.cos(), angles.sin()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's
        self._rotary = None  # would stay behind on a device that the model leaves
        return super()._apply(fn, recurse)

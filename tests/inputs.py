"""What a transformer eats, made from seeds, and the yardstick for what comes out."""

import hashlib

import torch

from mochi_lora.data.samples import TextEmbedding
from mochi_lora.model.tiny import TEXT_WIDTH
from mochi_lora.model.transformer import TextBatch, VelocityModel

SHAPE = (12, 2, 8, 12)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def caption(length: int, seed: int = 0) -> TextEmbedding:
    return TextEmbedding(normal(length, TEXT_WIDTH, seed=seed))


def captions(*lengths: int) -> TextBatch:
    return TextBatch.collate([caption(length, seed) for seed, length in enumerate(lengths, start=1)])


def velocity(model: VelocityModel, *, lengths: tuple[int, ...] = (5,), seed: int = 0) -> torch.Tensor:
    """One velocity [B, 12, 2, 8, 12] of seeded inputs, without gradients."""
    with torch.no_grad():
        return model(normal(len(lengths), *SHAPE, seed=seed), torch.full((len(lengths),), 0.7), captions(*lengths))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def hash_of_base(model: torch.nn.Module) -> str:
    """Hash over the bytes of every tensor that is not an adapter's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_" not in name:
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

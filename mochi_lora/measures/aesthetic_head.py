"""LAION's aesthetic predictor, version 1 (github.com/LAION-AI/aesthetic-predictor): a linear layer on CLIP ViT-L/14.

LAION publishes the layer as a pickle (sa_0_4_vit_l_14_linear.pth), which is not opened here. Convert it once, where you trust
it: read it with PyTorch, `weights_only=True`, and save its `weight` [1, 768] and `bias` [1] with `safetensors`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mochi_lora.errors import UserError
from mochi_lora.files import sha256_of_file

TOWER = "openai/clip-vit-large-patch14"  # what the head was fitted on
_NAMES = (("weight", "bias"), ("predictor.weight", "predictor.bias"))
_SHORT = 12  # digits of the digest


@dataclass(frozen=True)
class AestheticHead:
    """The linear layer."""

    name: str
    weight: np.ndarray  # float32 [D]
    bias: float

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """CLIP L/14 image embeddings float32 [N, D], rows of length 1 -> float32 [N], about 1 to 10."""
        width = self.weight.shape[0]
        if embeddings.shape[1] != width:
            raise UserError(
                f"{self.name}: made for embeddings of {width} numbers, got {embeddings.shape[1]}; "
                f"aesthetic quality needs {TOWER} as its image encoder"
            )
        assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3), "rows are not normalised"
        return (embeddings @ self.weight + self.bias).astype(np.float32)


def load_aesthetic_head(path: Path) -> AestheticHead:
    """The head from a safetensors file with `weight` [1, D] and `bias` [1] (or both under `predictor.`)."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a .safetensors file; pickles are not opened, see the head of aesthetic_head.py")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the aesthetic head cannot be read ({error}); check the path") from error
    for weight_name, bias_name in _NAMES:
        if weight_name in tensors and bias_name in tensors:
            weight, bias = tensors[weight_name].astype(np.float32), tensors[bias_name].astype(np.float32)
            if weight.ndim == 2 and weight.shape[0] == 1 and bias.shape == (1,):
                return AestheticHead(f"{path.name}@{sha256_of_file(path)[:_SHORT]}", weight[0], float(bias[0]))
    found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())[:5])
    raise UserError(f"{path}: expected weight [1, 768] and bias [1], found {found or 'nothing'}")

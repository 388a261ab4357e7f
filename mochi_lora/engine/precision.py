"""Which dtype each base tensor has at each precision."""

from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_KEEP_FP32 = ("pos_frequencies", "norm_q.", "norm_k.", "norm_added_q.", "norm_added_k.")


def is_kept_float32(name: str) -> bool:
    """Whether Genmo keeps the base tensor of this diffusers name in float32 (genmoai/mochi#115)."""
    return any(part in name for part in _KEEP_FP32)


def compute_dtype(precision: Precision) -> torch.dtype:
    """Dtype of matrix products and attention at `precision`."""
    return _DTYPES[precision]


def weight_dtype(name: str, precision: Precision) -> torch.dtype:
    """Dtype of one base tensor at `precision`: Genmo's list stays float32."""
    return torch.float32 if is_kept_float32(name) else compute_dtype(precision)

"""Which attention kernel is fastest on this device for a run's own shape: measured, forward and backward, before it starts."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mochi_lora.console import console
from mochi_lora.engine import flash4
from mochi_lora.engine.attention import attend, attention_refusal, check_attention
from mochi_lora.engine.kernels import Attention
from mochi_lora.errors import UserError

CANDIDATES: tuple[Attention, ...] = ("flash4", "cudnn", "flash", "efficient")  # math would hold all S x S scores
_REPEATS = 3  # after one that is not counted: it compiles flash4 (about 4 s) and lets cuDNN plan
_NO_MEMORY = "the GPU's memory was out"
Shape = tuple[int, int, int, int]  # [samples, tokens, heads, head size]


@dataclass(frozen=True)
class KernelTime:
    """One kernel's time on one shape, or why it has none."""

    attention: Attention
    forward_ms: float = float("inf")
    backward_ms: float = float("inf")
    refused: str | None = None

    @property
    def total_ms(self) -> float:
        """Forward and backward; infinite where the kernel is of no use."""
        return self.forward_ms + self.backward_ms


def resolve_attention(attention: Attention, device: torch.device, dtype: torch.dtype, shape: Shape) -> Attention:
    """The kernel a run uses: by name, checked for `shape`'s heads; `auto` on a GPU is the fastest one with finite gradients.

    On a CPU `auto` stays torch's own choice. Prints what was measured; measures once per process and shape, so a resumed run,
    which keeps its stored plan, does not ask again. Raises UserError if the kernel, or every one, is of no use here.
    """
    *_, heads, head_size = shape
    if attention != "auto" or device.type != "cuda":
        check_attention(attention, device, dtype, head_size, heads)
        return attention
    return _fastest(device, dtype, shape)


@lru_cache(maxsize=32)
def _fastest(device: torch.device, dtype: torch.dtype, shape: Shape) -> Attention:
    times = measure_kernels(device, dtype, shape, CANDIDATES)
    console.print(f"Attention on {list(shape)} (forward + backward): {', '.join(_in_words(row) for row in times)}")
    best = min(times, key=lambda row: row.total_ms)
    if all(row.refused == _NO_MEMORY for row in times):
        message = f"engine.attention: the GPU's memory is too full to try a kernel on {list(shape)} of {dtype}"
        raise UserError(f"{message}; end what else runs there, or make the batch or the bucket smaller")
    if best.refused is not None:
        message = (
            f"engine.attention: auto found no kernel that runs on {list(shape)} of {dtype} with finite gradients; set it to "
            "math, or make the batch or the bucket smaller"
        )
        raise UserError(message)
    return best.attention


def measure_kernels(
    device: torch.device, dtype: torch.dtype, shape: Shape, candidates: Sequence[Attention]
) -> list[KernelTime]:
    """Forward and backward of each candidate on random tokens of `shape`; a kernel that refuses says why in its row."""
    rows = []
    for attention in candidates:
        try:
            rows.append(_tried(attention, device, dtype, shape))
        except torch.OutOfMemoryError:
            rows.append(KernelTime(attention, refused=_NO_MEMORY))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the weights come next
    return rows


def time_attention(attention: Attention, qkv: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass; q, k, v [B, S, H, D] require gradients and get them."""
    device = grad.device
    start = _now(device)
    q, k, v = qkv
    result = attend(q, k, v, None, attention)
    middle = _now(device)
    result.backward(grad)
    return (middle - start) * 1e3, (_now(device) - middle) * 1e3


def random_tokens(device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and the gradient of the result, normal; the global generator is left alone."""
    draw = torch.Generator(device).manual_seed(0)
    *qkv, grad = (torch.randn(shape, generator=draw, device=device, dtype=dtype) for _ in range(4))
    return [tensor.requires_grad_() for tensor in qkv], grad


def _tried(attention: Attention, device: torch.device, dtype: torch.dtype, shape: Shape) -> KernelTime:
    reason = flash4.refusal(device) if attention == "flash4" else None
    reason = reason or attention_refusal(attention, device, dtype, shape[3], shape[2])
    if reason is not None:
        return KernelTime(attention, refused=reason)
    qkv, grad = random_tokens(device, dtype, shape)
    times = []
    for _ in range(1 + _REPEATS):
        for tensor in qkv:
            tensor.grad = None
        times.append(time_attention(attention, qkv, grad))
    if not all(tensor.grad is not None and bool(torch.isfinite(tensor.grad).all()) for tensor in qkv):
        return KernelTime(attention, refused="its gradients are not finite")
    forward, backward = (min(column) for column in zip(*times[1:], strict=True))
    return KernelTime(attention, forward, backward)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _in_words(row: KernelTime) -> str:
    if row.refused is not None:
        return f"{row.attention} not used ({row.refused})"
    return f"{row.attention} {row.forward_ms:.2f} + {row.backward_ms:.2f} ms"

"""FlashAttention-4 (`flash-attn-4`), an optional package for Hopper and Blackwell: found, or refused with what to install.

Written against 4.0.0b36, whose public functions keep their backward pass inside an `autograd.Function`. An operator of our own
needs the two halves, which are private names there; `_halves` is the one place that knows them.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from mochi_lora.errors import UserError, install_command

INTERFACE = "flash_attn.cute.interface"
_MAJORS = (9, 10)  # Hopper (SM90), Blackwell (SM100); it has no backward for SM80, and nothing for SM120 was tried
_OTHERWISE = "or set engine.attention to auto"


def refusal(device: torch.device) -> str | None:
    """Why flash4 cannot run on `device`, as a sentence for people; None if its package and the GPU are there."""
    if device.type != "cuda":
        return f"flash4 runs on an NVIDIA GPU of the Hopper or Blackwell generation, not on {device.type}"
    if not suits(device):
        return other_generation(*torch.cuda.get_device_capability(device))
    try:
        _halves()
    except UserError as error:
        return str(error)
    return None


def suits(device: torch.device) -> bool:
    """Whether this GPU is one that the package was made for; says nothing about whether it is installed."""
    return other_generation(*torch.cuda.get_device_capability(device)) is None


def other_generation(major: int, minor: int) -> str | None:
    """Why flash4 has nothing for a GPU of this compute capability; None if it has."""
    if major in _MAJORS:
        return None
    return f"flash4 wants compute capability 9.0 or 10.0 (H100, H200, B200), this GPU has {major}.{minor}"


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v [B, S, H, D] bf16 or fp16 -> attention of the same shape, logsumexp [B, H, S] float32. Raises UserError."""
    out, lse, *_ = _halves()[0](q, k, v, return_lse=True)
    return out, lse


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v. The sum over keys is atomic, in changing order, unless torch was told to be deterministic."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv = _halves()[1](q, k, v, out, grad, lse, deterministic=deterministic)
    return dq, dk, dv


@lru_cache(maxsize=1)
def _halves() -> tuple[Callable[..., tuple], Callable[..., tuple]]:
    _find_cutlass()
    try:
        interface = importlib.import_module(INTERFACE)
    except ImportError as error:
        message = (
            f"engine.attention: flash4 needs the package flash-attn-4, which does not import here ({error}); "
            f"{install_command('flash4')}, {_OTHERWISE}"
        )
        raise UserError(message) from error
    try:
        return interface._flash_attn_fwd, interface._flash_attn_bwd
    except AttributeError as error:
        message = f"engine.attention: flash4 was written for flash-attn-4 4.0.0b36, this one differs ({error}); {_OTHERWISE}"
        raise UserError(message) from error


def _find_cutlass() -> None:
    """`cutlass` lies in a folder that nvidia-cutlass-dsl adds by a .pth file, which PYTHONPATH entries do not get read."""
    if importlib.util.find_spec("cutlass") is not None:
        return
    for entry in tuple(sys.path):
        folder = Path(entry) / "nvidia_cutlass_dsl" / "dsl_packages"
        if folder.is_dir():
            sys.path.append(str(folder))

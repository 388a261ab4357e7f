"""How the transformer is run: the engine settings, resolved on this machine. Stored with every run and reused on resume."""

from dataclasses import dataclass

import torch

from mochi_lora.config.engine import EngineConfig
from mochi_lora.engine.attention import Attention, check_attention
from mochi_lora.engine.precision import Precision, compute_dtype
from mochi_lora.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Resolved engine settings; `attention: auto` is torch's own choice among its kernels."""

    device: str  # cuda or cpu; which GPU is the launcher's business
    precision: Precision
    attention: Attention
    checkpointing: str  # as in the configuration, `config.engine.checkpointing_runs` reads it; never auto
    block_swap: int = 0  # blocks whose weights live in pinned host memory
    compile: bool = False


def resolve_device(setting: str) -> str:
    """`cuda` or `cpu`. Raises UserError when a GPU is asked for and there is none."""
    if setting == "cuda" and not torch.cuda.is_available():
        message = (
            "engine.device: cuda was asked for, but torch sees no GPU here; check nvidia-smi and that torch is a CUDA "
            "build, or set engine.device to cpu"
        )
        raise UserError(message)
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return setting


def resolve_plan(engine: EngineConfig, head_size: int) -> Plan:
    """Settle `auto`, and check that the chosen attention kernel runs, forward and backward. Raises UserError."""
    plan = Plan(resolve_device(engine.device), engine.precision, engine.attention, engine.checkpointing)
    check_attention(plan.attention, torch.device(plan.device), compute_dtype(plan.precision), head_size)
    return plan

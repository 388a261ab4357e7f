"""How the transformer is run: the engine settings, resolved (`planning.resolve`). Stored with each run, reused on resume."""

from dataclasses import dataclass
from typing import Literal

import torch

from mochi_lora.engine.kernels import Attention
from mochi_lora.engine.precision import Precision
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
    context: int = 1  # ranks that share the tokens of one sample
    shard: int = 1  # ranks that hold one copy of the frozen base between them
    cpu_offload: bool = False  # transformer and VAE take turns on the device when videos are made
    guidance_passes: Literal["one", "two"] = "two"  # of a guided denoising step; one: a batch of both prompts

    def __str__(self) -> str:
        """As the settings are written."""
        words = [f"precision {self.precision}", f"attention {self.attention}", f"checkpointing {self.checkpointing}"]
        words += [f"block_swap {self.block_swap}"] if self.block_swap else []
        words += ["compile true"] if self.compile else []
        sizes = [f"{name}:{size}" for name, size in (("context", self.context), ("shard", self.shard)) if size > 1]
        words += [f"parallel {','.join(sizes)}"] if sizes else []
        words += ["cpu_offload true"] if self.cpu_offload else []
        words += ["guidance_passes one"] if self.guidance_passes == "one" else []
        return ", ".join(words)


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

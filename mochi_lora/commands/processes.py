"""The processes of one command: how many, which one, on which device, and what to say when its memory is full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration

from mochi_lora.console import console
from mochi_lora.engine.plan import resolve_device
from mochi_lora.errors import UserError

LONG_WAIT_MINUTES = 7 * 24 * 60  # encoding: a rank may be done days before its peers


def open_processes(device: str, timeout_minutes: float) -> Accelerator:
    """This process's view of the launch (`accelerate launch`, `torchrun`, or a plain start).

    Mixed precision is off here: the plan's precision is autocast in `VelocityModel`, for training and sampling alike.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no":
        console.print(f"accelerate's mixed_precision {asked} has no effect here; engine.precision decides", style="yellow")
    handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))]
    cpu = resolve_device(device) == "cpu"
    return Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=handlers, project_config=ProjectConfiguration())


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Turn a full GPU into a `UserError` that says what makes it fit; every other error passes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = (
            f"the GPU's memory is full ({str(error).splitlines()[0]}). What makes it fit, in this order: "
            "engine.checkpointing full, engine.cpu_offload true and engine.vae_tiling true (they cost time only), then fewer "
            "frames or a smaller size in data.buckets and sample; for T5, encode.text_precision int8"
        )
        raise UserError(message) from error

"""The processes of one command: how many, which one, and on which device."""

from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration

from mochi_lora.model.plan import resolve_device

LONG_WAIT_MINUTES = 7 * 24 * 60  # encoding: a rank may be done days before its peers


def open_processes(device: str, timeout_minutes: float) -> Accelerator:
    """This process's view of the launch (`accelerate launch`, `torchrun`, or a plain start).

    Mixed precision is off here: the plan's precision is autocast in `VelocityModel`, for training and sampling alike.
    """
    handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))]
    cpu = resolve_device(device) == "cpu"
    return Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=handlers, project_config=ProjectConfiguration())

"""How torch asks a GPU for memory. Does not import torch, which reads the setting from the environment as it is imported."""

import os
import sys
from collections.abc import MutableMapping

_NAME, _OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # torch from 2.10 on warns of the second
_SETTING = "expandable_segments:True"


def expand_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let pieces of GPU memory grow; what the user has set stands. To be called before anything lies on a GPU.

    In pieces of fixed size a step of a long clip leaves holes that no tensor fits: at 163 frames up to 10 GiB, and a run under
    a cap of 40 GiB ended with 32 in use (benchmarks/LOG.md). torch has expandable segments on Linux alone, and warns elsewhere.
    """
    if sys.platform != "linux" or _NAME in environment or _OLD_NAME in environment:
        return
    environment[_NAME] = _SETTING
    if (torch := sys.modules.get("torch")) is not None:
        torch._C._accelerator_setAllocatorSettings(_SETTING)

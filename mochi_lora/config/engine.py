"""Settings of the engine: how the transformer is run, in training and in sampling. No torch in this room."""

import re
from typing import Annotated, Literal, cast, get_args

from pydantic import AfterValidator, Field

from mochi_lora.config.section import Section

Mode = Literal["none", "mlp_recomputed", "attention_saved", "full", "offload"]
_FORM = f"one of {', '.join(get_args(Mode))} for all blocks, or in order with counts, such as attention_saved:36,none"


def checkpointing_runs(text: str) -> tuple[tuple[Mode, int | None], ...]:
    """`attention_saved:36,none` -> (("attention_saved", 36), ("none", None)): modes from the first block to the last.

    Only the last may have no count: it takes the blocks that are left. Raises ValueError with the form expected.
    """
    runs: list[tuple[Mode, int | None]] = []
    parts = text.split(",")
    for number, part in enumerate(parts, start=1):
        match = re.fullmatch(r"\s*(\w+)\s*(?::\s*(\d+)\s*)?", part)
        if match is None or match[1] not in get_args(Mode) or (match[2] is None and number < len(parts)):
            raise ValueError(f"checkpointing {text!r}: {part.strip()!r} is not understood; expected {_FORM}")
        runs.append((cast("Mode", match[1]), None if match[2] is None else int(match[2])))
    return tuple(runs)


def _legal_checkpointing(text: str) -> str:
    if text != "auto":
        checkpointing_runs(text)
    return text


class EngineConfig(Section):
    """How the transformer is run, in training and in sampling."""

    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto takes the GPU where there is one.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Base weights and arithmetic; adapter weights are always fp32."
    )
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = Field(
        "auto", description="Kernel of scaled dot product attention; auto lets torch choose."
    )
    checkpointing: Annotated[str, AfterValidator(_legal_checkpointing)] = Field(
        "full", description="full recomputes each block in the backward pass (little memory); none keeps everything (fast)."
    )
    vae_tiling: bool = Field(False, description="Decode in spatial tiles: far less memory, faint seams possible.")
    cpu_offload: bool = Field(False, description="When sampling, keep on the GPU only the part that is working.")

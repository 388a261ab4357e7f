"""Settings of the engine: how the transformer is run, in training and in sampling. No torch in this room."""

import re
from typing import Annotated, Literal, cast, get_args

from pydantic import AfterValidator, Field

from mochi_lora.config.section import Section

Mode = Literal["none", "mlp_recomputed", "attention_saved", "full", "offload"]
Split = Literal["data", "context", "shard"]
_SIZES_FORM = f"auto, or sizes of {', '.join(get_args(Split))}, each once at most, such as data:4,context:2"
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


def parallel_sizes(text: str) -> dict[Split, int]:
    """`data:4,context:2` -> {"data": 4, "context": 2}; auto -> {}. Raises ValueError with the form expected."""
    sizes: dict[Split, int] = {}
    for part in () if text == "auto" else text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*:\s*([1-9]\d*)\s*", part)
        if match is None or match[1] not in get_args(Split) or match[1] in sizes:
            raise ValueError(f"parallel {text!r}: {part.strip()!r} is not understood; expected {_SIZES_FORM}")
        sizes[cast("Split", match[1])] = int(match[2])
    return sizes


def _legal_parallel(text: str) -> str:
    parallel_sizes(text)
    return text


def _legal_checkpointing(text: str) -> str:
    if text != "auto":
        checkpointing_runs(text)
    return text


class EngineConfig(Section):
    """How the transformer is run, in training and in sampling. `mochi-lora plan` shows what auto comes to."""

    plan: Literal["auto", "exact", "smallest"] = Field(
        "auto",
        description="What decides the settings below that are left on auto: the fastest that fits the free memory over the "
        "whole run, the fastest exact (bf16) one that fits, or the one with the least memory.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto takes the GPU where there is one.")
    precision: Literal["auto", "bf16", "fp8", "nf4", "int8", "fp32"] = Field(
        "auto",
        description="Base weights and their products; adapter weights are always fp32. fp8, nf4 and int8 round the base. auto "
        "is fp32 on a CPU, and bf16 for sample and evaluate.",
    )
    attention: Literal["auto", "cudnn", "flash4", "flash", "efficient", "math"] = Field(
        "auto", description="Kernel of scaled dot product attention; auto takes the fastest of those that work here."
    )
    checkpointing: Annotated[str, AfterValidator(_legal_checkpointing)] = Field(
        "auto",
        description="What the forward pass keeps for the backward: auto, none (keeps all: fast, large), mlp_recomputed, "
        "attention_saved, full (keeps block inputs), offload (as attention_saved, in host memory); or with counts of blocks, "
        "such as attention_saved:36,none.",
    )
    block_swap: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="Blocks whose weights lie in pinned host memory and are fetched in time: auto, or how many."
    )
    compile: Literal["auto"] | bool = Field(
        "auto", description="Compile the blocks (first step up to a minute): auto (on a GPU), true or false."
    )
    cpu_offload: Literal["auto"] | bool = Field(
        "auto",
        description="When making videos, keep on the GPU only the part that is working: auto (where memory asks for it), true "
        "or false.",
    )
    guidance_passes: Literal["auto", "one", "two"] = Field(
        "auto",
        description="Prompt and negative prompt of a guided denoising step: one pass over a batch of both, two passes, or auto "
        "(two; for sample and evaluate one where it fits and is predicted to be at least 3 % faster).",
    )
    parallel: Annotated[str, AfterValidator(_legal_parallel)] = Field(
        "auto",
        description="How several processes share the work: auto (each its own samples), or sizes such as "
        "data:4,context:2,shard:8. data x context is the number of processes; context ranks share the tokens of one sample, "
        "shard ranks the frozen base.",
    )

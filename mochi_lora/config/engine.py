"""Settings of the engine: how the transformer is run, in training and in sampling."""

from typing import Literal

from pydantic import Field

from mochi_lora.config.section import Section


class EngineConfig(Section):
    """How the transformer is run, in training and in sampling."""

    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto takes the GPU where there is one.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Base weights and arithmetic; adapter weights are always fp32."
    )
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = Field(
        "auto", description="Kernel of scaled dot product attention; auto lets torch choose."
    )
    checkpointing: Literal["full", "none"] = Field(
        "full", description="full recomputes each block in the backward pass (little memory); none keeps everything (fast)."
    )
    vae_tiling: bool = Field(False, description="Decode in spatial tiles: far less memory, faint seams possible.")
    cpu_offload: bool = Field(False, description="When sampling, keep on the GPU only the part that is working.")

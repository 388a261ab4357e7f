"""Settings of the way from raw footage to captioned clips: `mochi-lora prepare` and `mochi-lora caption`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mochi_lora.config.section import Frames, Section


class PrepareConfig(Section):
    """From raw footage to a table of clips, by `mochi-lora prepare`: survey, split, filter, caption."""

    footage: Path = Field(Path("footage"), description="Raw video: a file, or a folder that is searched with its subfolders.")
    folder: Path = Field(
        Path("prepared"), description="Folder of what is found out about the footage, and of the tables of clips."
    )
    workers: int = Field(2, ge=1, description="Videos surveyed at once.")


class SplitConfig(Section):
    """Shots, and the clips that are taken from each."""

    cut_ratio: float = Field(
        3.0, gt=1, description="A cut changes the picture this many times as much as the frames around it (PySceneDetect)."
    )
    cut_change: float = Field(
        15.0, gt=0, description="A cut changes hue, saturation and brightness by at least this much on average, of 255."
    )
    black: float = Field(
        0.06, ge=0, lt=1, description="Mean luma (0 to 1) up to which a frame counts as black: a shot ends there."
    )
    margin: float = Field(0.1, ge=0, description="Seconds left out on both sides of a cut or fade.")
    mode: Literal["head", "middle", "chunk", "slide", "uniform"] = Field(
        "chunk",
        description="Clips of a shot: its beginning, its middle, one after the other, one every stride, or count spread out.",
    )
    frames: Frames = Field(37, description="Length of a clip in frames at 30 per second, 6k+1.")
    stride: int = Field(30, ge=1, description="Frames at 30 per second from one clip's start to the next; only for slide.")
    count: int = Field(2, ge=1, description="Clips from each shot, fewer where it is short; only for uniform.")


class FilterConfig(Section):
    """Which clips are left out. Each limit can be null, which is off; `filter` prints what each one was cut from."""

    max_black: float | None = Field(0.0, ge=0, le=1, description="Largest share of black frames (0 to 1).")
    min_luma: float | None = Field(0.1, ge=0, le=1, description="Darkest mean luma (0 to 1).")
    min_motion: float | None = Field(
        0.1, ge=0, description="Least motion: fastest 5 % of the picture, in percent of the short side per 1/8 s."
    )
    max_motion: float | None = Field(None, ge=0, description="Most motion, in the same unit.")
    min_sharpness: float | None = Field(
        20.0, ge=0, description="Least variance of the Laplacian of the luma (0 to 255) at 360 lines, or all there are."
    )
    max_flicker: float | None = Field(
        0.01, ge=0, description="Most swing of the brightness from frame to frame that motion does not explain (0 to 1)."
    )
    duplicate_bits: float | None = Field(
        6.0, ge=0, le=64, description="Clips of two shots whose picture hashes differ in at most so many of 64 bits are one."
    )
    crop_bars: bool = Field(True, description="Crop letterbox bars off; false keeps them and flags the clip.")


class CaptionConfig(Section):
    """Captions by a vision-language model: `mochi-lora caption`, and the last step of `mochi-lora prepare`."""

    clips: Path | None = Field(
        None, description="Folder of clips or JSONL table to caption; null takes the table of prepare.folder."
    )
    model: str | None = Field(
        "Qwen/Qwen3-VL-4B-Instruct",
        description="Hub id (OWNER/NAME@REVISION pins it) or local folder of a chat model that takes several pictures; null "
        "asks none: only corrections of the sheet are taken over.",
    )
    quantisation: Literal["none", "4bit"] = Field(
        "none", description="4bit (NF4, bitsandbytes) needs about a third of the memory and answers slightly differently."
    )
    batch: int = Field(4, ge=1, description="Clips asked about at once.")
    frames: int = Field(8, ge=1, le=64, description="Evenly spaced frames of each clip that the model sees.")
    longest_side: int = Field(448, ge=64, description="Pixels to which these frames are shrunk.")
    answer_tokens: int = Field(320, ge=16, description="Longest answer, in the model's own tokens.")
    instruction: str | None = Field(
        None, min_length=1, description="What the model is asked to write; null takes the built-in request, tuned for Mochi."
    )
    trigger: str | None = Field(
        None, description='Words that call the adapter, put into new captions; null takes evaluation.trigger, "" puts none.'
    )
    trigger_position: Literal["start", "end"] = Field("start", description="Where the trigger stands in a new caption.")
    prefix: str = Field("", description="Text put before every new caption, with its own punctuation.")
    overwrite: bool = Field(
        False,
        description="Also replace captions that are there; lines corrected in the sheet and answers to the same question are "
        "kept.",
    )

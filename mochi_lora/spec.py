"""Mochi-1's numbers, and what is legal. No torch here: configuration and `--help` read this room.

Sources: genmoai/mochi @0c86aeb (`dit/joint_model`, `vae/models.py`, `t2v_synth_mochi.py`) and the published
`AutoencoderKLMochi` configuration. Nothing else in the project spells these numbers again.
"""

import re
from dataclasses import dataclass
from functools import cached_property

FRAMES_PER_SECOND = 30
TIME_COMPRESSION = 6  # latent frames = (frames - 1) / 6 + 1: the VAE is causal, the first frame stands alone
SPACE_COMPRESSION = 8
PATCH = 2  # the transformer joins 2 x 2 latent cells into one token
SIZE_STEP = SPACE_COMPRESSION * PATCH
LATENT_CHANNELS = 12
TEXT_TOKENS = 256
TRAINED_HEIGHT, TRAINED_WIDTH = 480, 848
BASE_MODEL = "genmo/mochi-1-preview"
TRANSFORMER_PARAMETERS = 10_027_677_744


def illegal_frames(frames: int) -> str | None:
    """Why `frames` is not a legal count (with its legal neighbours), or None when it is."""
    if frames >= 1 and (frames - 1) % TIME_COMPRESSION == 0:
        return None
    below = max(1, frames - (frames - 1) % TIME_COMPRESSION)
    return f"{frames} frames: Mochi takes 6k+1 frames, use {below} or {below + TIME_COMPRESSION}"


def illegal_size(name: str, size: int) -> str | None:
    """Why `size` is not a legal height or width in pixels (with its legal neighbours), or None when it is."""
    if size >= SIZE_STEP and size % SIZE_STEP == 0:
        return None
    below = max(SIZE_STEP, size - size % SIZE_STEP)
    return f"{name} {size}: Mochi takes multiples of {SIZE_STEP}, use {below} or {below + SIZE_STEP}"


@dataclass(frozen=True, order=True)
class Bucket:
    """A clip shape in pixels. Every batch holds one shape; written `37x480x848` (frames x height x width)."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        problems = (illegal_frames(self.frames), illegal_size("height", self.height), illegal_size("width", self.width))
        if found := [problem for problem in problems if problem]:
            raise ValueError("; ".join(found))

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """`37x480x848` -> Bucket(37, 480, 848). Raises ValueError with the form expected."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if match is None:
            raise ValueError(f"bucket {text!r}: expected FRAMESxHEIGHTxWIDTH, for instance 37x480x848")
        return cls(*(int(part) for part in match.groups()))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[channels, latent frames, latent height, latent width] of one encoded clip."""
        frames = (self.frames - 1) // TIME_COMPRESSION + 1
        return (LATENT_CHANNELS, frames, self.height // SPACE_COMPRESSION, self.width // SPACE_COMPRESSION)

    @cached_property
    def tokens(self) -> int:
        """Visual tokens the transformer sees for one clip of this shape."""
        _, frames, height, width = self.latent_shape
        return frames * (height // PATCH) * (width // PATCH)

    @property
    def seconds(self) -> float:
        """Time between the first frame and the last, in seconds."""
        return (self.frames - 1) / FRAMES_PER_SECOND

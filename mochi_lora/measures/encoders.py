"""What measuring asks of a network: to embed frames, or to say how well a clip fits each of some prompts."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class ImageEncoder(Protocol):
    """Frames to vectors: content, background, or style, depending on the network."""

    @property
    def name(self) -> str:
        """Id and revision: two encoders of one name give the same numbers."""
        ...

    @property
    def comparable(self) -> bool:
        """Whether other people's numbers of this name mean the same; False for built-in substitutes."""
        ...

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] -> float32 [N, D], rows of length 1; a frame's row does not depend on the others."""
        ...


class Aligner(Protocol):
    """One clip against prompts."""

    @property
    def name(self) -> str:
        """Id and revision: two aligners of one name give the same numbers."""
        ...

    @property
    def comparable(self) -> bool:
        """Whether other people's numbers of this name mean the same; False for built-in substitutes."""
        ...

    def scores(self, frames: np.ndarray, fps: float, prompts: Sequence[str]) -> np.ndarray:
        """Similarity of one clip, uint8 [F, H, W, 3], to each prompt: float32 [P], larger is better.

        A prompt's score does not depend on the other prompts. The aligner chooses its own frames.
        """
        ...

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than what the network reads; their endings are cut."""
        ...


def choose_frames(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `count` frames, evenly spaced, first and last included; all where there are fewer."""
    assert count >= 1, "a clip without frames"
    assert wanted >= 2, f"first and last are two frames, got {wanted}"
    return list(range(count)) if count <= wanted else np.linspace(0, count - 1, wanted).round().astype(int).tolist()


def exactly(count: int, wanted: int) -> list[int]:
    """As `choose_frames`, but always `wanted` indices: frames of a shorter clip are repeated, in order."""
    assert count >= 1, "a clip without frames"
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [N, D] scaled to length 1, float32. A row of zeros or NaN is a broken network, not a direction."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    assert np.all(np.isfinite(lengths)), "embeddings hold NaN or infinity"
    assert np.all(lengths > 0), "an embedding is 0 everywhere"
    return (rows / lengths).astype(np.float32)


def check_frames(frames: np.ndarray) -> None:
    """Assert uint8 [N, H, W, 3] with N >= 1."""
    assert frames.dtype == np.uint8, f"expected uint8, got {frames.dtype}"
    assert frames.ndim == 4, f"expected [N, H, W, 3], got {frames.shape}"
    assert frames.shape[3] == 3, f"expected [N, H, W, 3], got {frames.shape}"
    assert len(frames) >= 1, "no frames"

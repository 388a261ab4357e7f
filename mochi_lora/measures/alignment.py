"""Does the clip show its prompt: cosines of frames and text, and the rank of the own prompt among all.

Shape legend: F frames, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mochi_lora.measures.similarity import checked


@dataclass(frozen=True)
class Retrieval:
    """How clips rank their own prompts."""

    recall: float  # share of clips whose own prompt is first
    median_rank: float  # 1 is best


def frame_text(frames: np.ndarray, text: np.ndarray) -> float:
    """Mean cosine of `frames` float32 [F, D] with `text` float32 [D], in [-1, 1] (CLIPScore without its factor and floor)."""
    return float((checked(frames) @ checked(text[None])[0]).mean())


def own_ranks(scores: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """Rank of prompt own[c] among all prompts for each clip c, float64 [clips]; `scores` float [clips, prompts], finite.

    A tie gets the rank that drawing lots would give on average: a blind model that scores all prompts alike ranks in the
    middle, not first.
    """
    ahead, tied = _against_own(scores, own)
    return 1 + ahead + tied / 2


def retrieval(scores: np.ndarray, own: Sequence[int]) -> Retrieval:
    """Recall at 1 (a tie for first place counts as the chance of winning it) and median of `own_ranks`."""
    ahead, tied = _against_own(scores, own)
    first = np.where(ahead == 0, 1 / (1 + tied), 0.0)
    return Retrieval(recall=float(first.mean()), median_rank=float(np.median(1 + ahead + tied / 2)))


def _against_own(scores: np.ndarray, own: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each clip, how many prompts score higher than its own, and how many others score the same."""
    assert scores.ndim == 2, f"expected [clips, prompts], got {scores.shape}"
    assert len(scores) == len(own) > 0, f"{len(scores)} rows of scores, {len(own)} clips"
    assert np.all(np.isfinite(scores)), "scores hold NaN or infinity"
    assert all(0 <= index < scores.shape[1] for index in own), "a clip's own prompt is not among the prompts"
    mine = scores[np.arange(len(own)), list(own)][:, None]
    return np.sum(scores > mine, axis=1).astype(np.float64), np.sum(scores == mine, axis=1) - 1.0

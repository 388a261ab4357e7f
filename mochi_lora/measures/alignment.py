"""Does the clip show its prompt rather than another: where its own prompt stands among all that were scored."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Place:
    """Where one clip puts its own prompt."""

    first: float  # 1 where its own scores highest, else 0; a tie counts as the chance of winning it
    rank: float  # 1 is best


def placed(scores: np.ndarray, own: int) -> Place:
    """Place of prompt `own` in `scores` float [prompts], finite, those of one clip with each prompt.

    A tie gets what drawing lots would give on average: a blind model that scores all prompts alike ranks in the middle, not
    first. The mean of `first` over clips is recall at 1.
    """
    assert scores.ndim == 1, f"expected [prompts], got {scores.shape}"
    assert np.all(np.isfinite(scores)), "scores hold NaN or infinity"
    assert 0 <= own < len(scores), "a clip's own prompt is not among the prompts"
    ahead, tied = int((scores > scores[own]).sum()), int((scores == scores[own]).sum()) - 1
    return Place(first=0.0 if ahead else 1 / (1 + tied), rank=1 + ahead + tied / 2)

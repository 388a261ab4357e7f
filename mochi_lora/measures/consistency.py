"""VBench's temporal consistency of a clip, on whichever frame embeddings it is given.

Shape legend: F frames, D dimensions.
"""

import numpy as np

from mochi_lora.measures.similarity import checked


def consistency(embeddings: np.ndarray) -> float:
    """Mean over frames t >= 1 of (max(0, cos(f_t, f_t-1)) + max(0, cos(f_t, f_0))) / 2; float32 [F, D], F >= 2; in [0, 1].

    VBench (Huang et al., 2311.17982): `subject_consistency` on DINO, `background_consistency` on CLIP embeddings. Clipping
    is per cosine, before the means. A frozen clip scores 1.
    """
    frames = checked(embeddings)
    assert len(frames) >= 2, "one frame is consistent with nothing"
    previous = np.sum(frames[1:] * frames[:-1], axis=1)
    first = frames[1:] @ frames[0]
    return float((np.maximum(previous, 0) + np.maximum(first, 0)).mean() / 2)

"""What is measured: every measure's name, axis, direction and the sentence that explains it. No torch here."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["quality", "alignment", "style", "context"]
Better = Literal["up", "down", "neither"]


@dataclass(frozen=True)
class Measure:
    """One number about a clip (or about a set of clips)."""

    name: str
    axis: Axis
    better: Better
    label: str  # for people, at most four words
    meaning: str  # one plain sentence


_ROWS: tuple[Measure, ...] = (
    Measure(
        "quality.subject_consistency",
        "quality",
        "up",
        "Subject consistency",
        "How alike the frames of a clip are to its first and to their predecessors, as a network trained on objects sees "
        "them (VBench's formula). A frozen clip scores 1: read it beside motion amount.",
    ),
    Measure(
        "quality.background_consistency",
        "quality",
        "up",
        "Background consistency",
        "The same formula on embeddings of the whole picture.",
    ),
    Measure(
        "quality.warp_error",
        "quality",
        "down",
        "Warp error",
        "What is left between two frames after following the optical flow from one to the other, where nothing is hidden: "
        "flicker. 0 to 1.",
    ),
    Measure(
        "quality.motion_smoothness",
        "quality",
        "up",
        "Motion smoothness",
        "How well each frame is predicted from its two neighbours, warped half-way. 1 is perfectly; a frozen clip scores 1.",
    ),
    Measure(
        "quality.motion_amount",
        "context",
        "neither",
        "Motion amount",
        "The fastest 5 % of the optical flow, in percent of the short side per eighth of a second. Neither good nor bad, "
        "but all consistency measures reward a frozen clip.",
    ),
    Measure("quality.aesthetic", "quality", "up", "Aesthetic score", "LAION's linear head on CLIP embeddings, 1 to 10."),
    Measure(
        "align.clip",
        "alignment",
        "up",
        "Frame-text alignment",
        "Mean cosine between frames and the prompt without its trigger. Blind to motion.",
    ),
    Measure(
        "align.clip_first",
        "alignment",
        "up",
        "Frame-text retrieval",
        "How often frame-text alignment is highest for the clip's own prompt among all of its prompt set. 0 to 1.",
    ),
    Measure(
        "align.clip_rank",
        "alignment",
        "down",
        "Frame-text rank",
        "Mean place of the clip's own prompt, by frame-text alignment, among all of its prompt set. 1 is first.",
    ),
    Measure(
        "align.video",
        "alignment",
        "up",
        "Video-text alignment",
        "Similarity of the whole clip and the prompt without its trigger.",
    ),
    Measure(
        "align.video_first",
        "alignment",
        "up",
        "Video-text retrieval",
        "How often video-text alignment is highest for the clip's own prompt among all of its prompt set. 0 to 1.",
    ),
    Measure(
        "align.video_rank",
        "alignment",
        "down",
        "Video-text rank",
        "Mean place of the clip's own prompt, by video-text alignment, among all of its prompt set. 1 is first.",
    ),
    Measure(
        "align.judge",
        "alignment",
        "up",
        "Judge",
        "Probability of yes from a vision-language model asked whether the clip shows it.",
    ),
    Measure(
        "style.descriptor",
        "style",
        "up",
        "Style similarity",
        "Cosine of style descriptors between the clip's frames and the nearest reference frames.",
    ),
    Measure(
        "style.gram",
        "style",
        "up",
        "Texture and colour",
        "Cosine of Gram statistics of a convolutional network between the clip and the references.",
    ),
    Measure(
        "style.distance",
        "style",
        "down",
        "Style distance",
        "Unbiased squared MMD between embeddings of all clips and of the references; 0 means not distinguishable.",
    ),
    Measure(
        "drift.content",
        "context",
        "neither",
        "Content kept",
        "Cosine between the adapter's clip and the base's of the same prompt and seed; 1 is unchanged.",
    ),
    Measure(
        "diversity",
        "context",
        "neither",
        "Diversity",
        "Mean distance between clips of one prompt and different seeds. Less than 0.7 of the base's warns of collapse.",
    ),
)
MEASURES: dict[str, Measure] = {row.name: row for row in _ROWS}

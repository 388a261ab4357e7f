"""What an evaluation found: the seam between measuring and telling. Plain values, no torch, no numpy.

Everything a report shows is in `Evaluation`; `report/` renders it and decides nothing. A value that could not be had is a
`Missing` with its reason, never a zero.
"""

from dataclasses import dataclass, field
from typing import Literal

# trigger: held-out content with the trigger word; plain: the same content without it; unrelated: other content, no trigger;
# training: captions of training clips, where a copy is likeliest to show (only for memorisation, never compared).
PromptSet = Literal["trigger", "plain", "unrelated", "training"]
Conclusion = Literal["better", "worse", "no worse", "unclear", "indicative", "context"]  # context: neither good nor bad


def file_name(name: str, *, quick: bool) -> str:
    """What a report's file is called: a quick look shares videos, and so the folder, with the full evaluation."""
    return f"quick-{name}" if quick else name


@dataclass(frozen=True)
class Missing:
    """Something that was not computed."""

    what: str  # a measure's name, or the name of a part: memorisation, curve, losses, ...
    because: str  # ends the sentence "not computed because ..."


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One clip and its numbers: one line of `clips.jsonl`. `values` lacks what was not computed."""

    video: str  # path relative to the evaluation's folder
    prompt_set: PromptSet
    prompt: str
    seed: int
    adapter: str  # "base", or a label such as "adapter" or "step 200"
    strength: float
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tally:
    """Prompts on which the adapter is better than the base, equal to it, worse; for what is neither: larger, equal, smaller."""

    better: int
    equal: int
    worse: int


@dataclass(frozen=True)
class Comparison:
    """Adapter against base for one measure on one prompt set; the prompt is the unit."""

    measure: str
    prompt_set: PromptSet
    primary: bool  # one of the three that carry the verdict, fixed before measuring
    base: float
    adapter: float
    difference: Interval  # adapter - base, 95 %, bootstrap over prompts
    prompts: int
    p_value: float | None  # of the test the conclusion rests on; None where nothing is tested (--quick, context)
    p_adjusted: float | None  # after Holm over the primaries
    tally: Tally
    effect_size: float | None  # d_z: mean difference / its standard deviation; None where that is 0
    margin: float | None  # of non-inferiority, as a positive number in the measure's unit; None for superiority
    conclusion: Conclusion


@dataclass(frozen=True)
class Bleed:
    """How much of the style shows up where nobody asked for it: change on `prompt_set` / change on trigger prompts."""

    prompt_set: PromptSet
    ratio: Interval  # 0 none, 1 total
    drift: float | None  # mean drift.content on that set


@dataclass(frozen=True)
class SetDistance:
    """How far all clips of one side are from the references, as two sets of embeddings."""

    measure: str
    base: float
    adapter: float
    base_p: float | None  # permutation test of "no difference from the references"; None where nothing is tested (--quick)
    adapter_p: float | None


@dataclass(frozen=True)
class Neighbour:
    """A generated clip and the training clip nearest to it."""

    video: str
    prompt: str
    training_clip: str  # folder/name, @seconds where it begins later
    similarity: float
    ratio: float  # similarity to the nearest / mean of the second to fifth nearest
    flagged: bool
    picture: str | None  # path relative to the evaluation's folder: the two closest frames side by side


@dataclass(frozen=True)
class Memorisation:
    """Does the adapter replay its training clips?"""

    flagged_share: float  # of the adapter's clips
    base_flagged_share: float  # of the base's clips at the same prompts and seeds
    threshold: float  # similarity above which a clip is flagged
    calibration: str  # one sentence: how the threshold came about
    nearest: tuple[Neighbour, ...]  # most similar first
    motion_similarity: float | None  # same, of flow directions
    conclusion: Literal["memorises", "does not memorise"]
    # Whose videos were searched: on captions of training clips, or on the trigger prompts where none were made for those.
    prompt_set: PromptSet = "training"
    scope: str = ""  # a sentence: how many videos of each side on what, against how many training clips


@dataclass(frozen=True)
class StrengthPoint:
    """Means over the trigger prompts at one strength."""

    strength: float
    values: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """Strength against style, alignment, drift."""

    points: tuple[StrengthPoint, ...]  # in order of strength
    spearman: float | None  # rank correlation of strength and the style primary
    knee: float | None  # strength beyond which style hardly grows while the rest suffers


@dataclass(frozen=True)
class CheckpointPoint:
    """Means over the trigger prompts at one checkpoint."""

    step: int
    adapter: str
    values: dict[str, float]
    admissible: bool  # quality and alignment are no worse than the base's
    held_out_loss: float | None


@dataclass(frozen=True)
class Curve:
    """One point per checkpoint, and which one to keep."""

    points: tuple[CheckpointPoint, ...]
    recommended: str | None  # adapter path of the point to keep: highest style among the admissible
    because: str


@dataclass(frozen=True)
class BandLoss:
    """Velocity loss at one sigma: base and adapter, on training and on held-out clips."""

    sigma: float
    base_held_out: Interval
    adapter_held_out: Interval
    base_training: Interval
    adapter_training: Interval
    change_held_out: Interval | None = None  # adapter - base, clip by clip: far narrower than between the two above
    change_training: Interval | None = None


@dataclass(frozen=True)
class Verdict:
    """The first thing people read."""

    headline: str  # one sentence
    worked: bool | None  # None: cannot be said
    reasons: tuple[str, ...]  # plain sentences, one per axis and per warning
    advice: tuple[str, ...]  # what to try next, most useful first


@dataclass(frozen=True)
class Pair:
    """Base and adapter side by side."""

    prompt_set: PromptSet
    prompt: str
    seed: int
    base_video: str
    adapter_video: str
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Everything."""

    title: str
    adapter: str  # path
    base_model: str
    quick: bool  # trigger prompts only, nothing tested: labelled indicative
    incomparable: tuple[str, ...]  # measures by built-in backbones: their numbers cannot be compared with other people's
    backbones: dict[str, str]  # role -> name and revision
    settings: dict[str, str]  # frames, size, steps, guidance, seeds, prompts per set, versions, ...
    verdict: Verdict
    comparisons: tuple[Comparison, ...]
    missing: tuple[Missing, ...] = ()
    bleed: tuple[Bleed, ...] = ()
    distance: SetDistance | None = None
    memorisation: Memorisation | None = None
    strength_zero_is_base: bool | None = None  # bit for bit; None: that video was not made
    sweep: Sweep | None = None
    curve: Curve | None = None
    losses: tuple[BandLoss, ...] = ()
    pairs: tuple[Pair, ...] = ()
    grids: tuple[str, ...] = ()  # videos of the strengths side by side, relative to the evaluation's folder
    truth: dict[str, tuple[float, float]] = field(default_factory=dict)  # drawn world only: what -> (base, adapter), exact

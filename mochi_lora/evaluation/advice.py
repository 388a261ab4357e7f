"""What to try next: one list of changes per finding. Settings are named as the configuration names them."""

from collections.abc import Collection
from typing import Literal

from mochi_lora.evaluation.results import Curve, Sweep

Finding = Literal[
    "memorises",
    "overfit",
    "frozen",
    "alignment worse",
    "quality worse",
    "no style",
    "style away",
    "leaks",
    "trigger idle",
    "uniform",
    "open",
    "not measured",
    "quick",
]

# In order of urgency.
_ADVICE: dict[Finding, tuple[str, ...]] = {
    "memorises": (
        "Train on more, and more varied, clips (data.clips): a handful is learnt by heart.",
        "Lower train.steps, and adapter.rank with it; the held-out loss shows where learning turned into memorising.",
    ),
    "overfit": (
        "Keep an earlier checkpoint: adapters/best.safetensors of the run has the lowest held-out loss.",
        "Lower train.steps, or train on more clips (data.clips).",
    ),
    "not measured": ("Mend what kept a measure from being computed, and evaluate again: the videos are kept.",),
    "frozen": (
        "Train on clips that move (data.clips): still footage teaches stillness.",
        "Lower sample.strength, or train.steps.",
    ),
    "alignment worse": (
        "Lower sample.strength: the cheapest way back to the prompt.",
        "Lower train.steps or train.learning_rate, each by half: it was trained past what was needed.",
        "Let the captions of data.clips say what is in each clip, and lower objective.caption_dropout if it is above 0.1.",
    ),
    "quality worse": (
        "Lower sample.strength, or train.learning_rate by half.",
        "Look at the clips in data.clips: blur, cuts and compression are learnt as part of the style.",
    ),
    "no style": (
        "Raise train.steps, to twice as many first.",
        "Raise train.learning_rate, at most to 0.0002, then adapter.rank to 16.",
        "Check that every caption in data.clips has the trigger and leaves the style itself undescribed.",
    ),
    "style away": (
        "Check that the references show the style of data.clips, and that the prompts hold the trigger as the captions do.",
        "Lower train.learning_rate: too high a rate leaves every style behind.",
    ),
    "leaks": (
        "Add clips without the style, captioned without the trigger, to data.clips.",
        "Lower objective.caption_dropout: a dropped caption teaches the style without its trigger.",
        "Lower sample.strength, or train.steps.",
    ),
    "trigger idle": (
        "Set adapter.targets to joint_attention: visual_attention cannot give a trigger word its meaning.",
        "Add clips without the style, captioned without the trigger, to data.clips.",
        "If the style is always wanted, nothing is wrong: the trigger is not needed.",
    ),
    "uniform": ("Lower train.steps, or train on more varied clips (data.clips): its videos have become alike.",),
    "open": ("Evaluate with more prompts; more prompts say more than more seeds.",),
    "quick": ("Evaluate without --quick before relying on this.",),
}


def advise(findings: Collection[Finding], sweep: Sweep | None, curve: Curve | None) -> tuple[str, ...]:
    """Advice for `findings`, most useful first and each once: what costs no training goes before what does."""
    grave = [text for finding in ("memorises", "not measured") if finding in findings for text in _ADVICE[finding]]
    free = []
    if curve is not None and curve.recommended is not None:
        free.append(f"Keep {curve.recommended}: {curve.because}.")
    if sweep is not None and sweep.knee is not None:
        free.append(f"Try sample.strength {sweep.knee:g}: beyond it the style hardly grows while the rest suffers.")
    ordered = grave + free + [text for finding, texts in _ADVICE.items() if finding in findings for text in texts]
    return tuple(dict.fromkeys(ordered)) or ("Nothing needs changing; watch the videos side by side before you share it.",)

"""Made-up but plausible evaluations, with videos drawn on the spot."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mochi_lora.evaluation.results import (
    BandLoss,
    Bleed,
    CheckpointPoint,
    Comparison,
    Curve,
    Evaluation,
    Interval,
    Memorisation,
    Missing,
    Neighbour,
    Pair,
    StrengthPoint,
    Sweep,
    Tally,
    Verdict,
)
from mochi_lora.inference.video import write_mp4
from mochi_lora.measures.catalogue import MEASURES
from mochi_lora.tiny.render import render
from mochi_lora.tiny.world import Scene, caption, chalk_caption, draw_scene

NASTY = """<script>alert('x')</script> "quoted" & 'single' | `ticks`"""

# measure: base, adapter, half-width of the interval
NUMBERS = {
    "quality.subject_consistency": (0.943, 0.951, 0.006),
    "quality.background_consistency": (0.962, 0.957, 0.004),
    "quality.warp_error": (0.0121, 0.0119, 0.0008),
    "quality.motion_smoothness": (0.981, 0.983, 0.002),
    "quality.motion_amount": (3.41, 3.12, 0.31),
    "align.clip": (0.291, 0.288, 0.005),
    "align.clip_first": (0.88, 0.85, 0.06),
    "align.clip_rank": (1.22, 1.31, 0.12),
    "style.descriptor": (0.312, 0.684, 0.041),
    "style.gram": (0.41, 0.79, 0.05),
    "style.distance": (0.214, 0.047, 0.02),
    "drift.content": (1.0, 0.71, 0.03),
    "diversity": (0.44, 0.41, 0.03),
}
PRIMARIES = {"quality.subject_consistency": 0.01, "align.clip": 0.01, "style.descriptor": None}


def comparison(measure, prompt_set="trigger", conclusion=None, **changes):
    base, adapter, half = NUMBERS[measure]
    if prompt_set != "trigger":
        adapter = base + 0.08 * (adapter - base)
    difference = adapter - base
    better = MEASURES[measure].better
    context = better == "neither"
    margin = PRIMARIES.get(measure)
    gain = abs(difference) if better == "neither" else difference if better == "up" else -difference
    if conclusion is None:
        conclusion = "context" if context else "better" if gain > half else "worse" if gain < -half else "unclear"
        if margin is not None and gain - half > -margin:
            conclusion = "no worse"
    row = Comparison(
        measure=measure,
        prompt_set=prompt_set,
        primary=measure in PRIMARIES and prompt_set == "trigger",
        base=base,
        adapter=adapter,
        difference=Interval(difference, difference - half, difference + half),
        prompts=30,
        p_value=None if context else 0.0002 if gain > half else 0.21,
        p_adjusted=(0.0006 if gain > half else 0.021) if measure in PRIMARIES and prompt_set == "trigger" else None,
        tally=Tally(28, 0, 2) if gain > half else Tally(12, 4, 14),
        effect_size=None if context else 1.84 if gain > half else 0.09,
        margin=margin if prompt_set == "trigger" else None,
        conclusion=conclusion,
    )
    return replace(row, **changes)


def sweep():
    strengths = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    style = (0.312, 0.395, 0.521, 0.648, 0.684, 0.697)
    alignment = (0.291, 0.291, 0.290, 0.289, 0.288, 0.271)
    kept = (1.0, 0.95, 0.87, 0.78, 0.71, 0.58)
    quality = (0.943, 0.945, 0.949, 0.951, 0.951, 0.938)
    names = ("style.descriptor", "align.clip", "drift.content", "quality.subject_consistency")
    points = tuple(
        StrengthPoint(strength, dict(zip(names, values, strict=True)))
        for strength, *values in zip(strengths, style, alignment, kept, quality, strict=True)
    )
    return Sweep(points, spearman=1.0, knee=0.75)


def curve():
    rows = ((100, 0.401, 0.291, 0.412, True), (200, 0.563, 0.290, 0.398, True), (300, 0.651, 0.289, 0.391, True))
    rows += ((400, 0.684, 0.288, 0.389, True), (500, 0.701, 0.274, 0.394, False), (600, 0.709, 0.266, 0.403, False))
    points = tuple(
        CheckpointPoint(step, f"adapters/step_{step}", {"style.descriptor": style, "align.clip": alignment}, fine, loss)
        for step, style, alignment, loss, fine in rows
    )
    because = "Step 400 has the strongest style among the checkpoints whose quality and alignment are no worse than the base's."
    return Curve(points, "adapters/step_400", because)


def losses():
    bands = []
    for index, sigma in enumerate((0.125, 0.375, 0.625, 0.875)):
        base = 0.62 - 0.11 * index

        def around(value):
            return Interval(value, value - 0.03, value + 0.03)

        bands.append(BandLoss(sigma, around(base), around(base - 0.05), around(base + 0.01), around(base - 0.07)))
    return tuple(bands)


def memorisation(folder: Path | None, conclusion="does not memorise"):
    flagged = conclusion == "memorises"
    nearest = tuple(
        Neighbour(
            video=f"videos/adapter_{index}.mp4",
            prompt=f"chalk style, a red star moves left on dark slate, take {index}",
            training_clip=f"clips/{index:03d}_star.mp4",
            similarity=(0.97 if flagged else 0.78) - 0.03 * index,
            ratio=1.31 if flagged else 1.04,
            flagged=flagged and index < 2,
            picture=f"nearest/{index}.png" if folder else None,
        )
        for index in range(3)
    )
    return Memorisation(
        flagged_share=0.42 if flagged else 0.02,
        base_flagged_share=0.02,
        threshold=0.86,
        calibration="The threshold is the 99th percentile of the similarity between different training clips.",
        nearest=nearest,
        motion_similarity=0.31,
        conclusion=conclusion,
        scope="Looked at were 8 videos of the adapter on captions of training clips, each against the training clips (64).",
    )


def pairs() -> tuple[Pair, ...]:
    made = []
    for index in range(8):
        prompt_set = ("trigger", "trigger", "plain", "unrelated")[index % 4]
        words = chalk_caption if prompt_set == "trigger" else caption
        prompt = words(scene(index), np.random.default_rng(index))
        name = f"videos/{index:03d} {prompt_set}"
        made.append(Pair(prompt_set, prompt, 0, f"{name} base.mp4", f"{name} adapter.mp4"))
    return tuple(made)


def worked() -> Evaluation:
    """Everything is there and it went well."""
    rows = [comparison(name) for name in NUMBERS]
    rows += [
        comparison(name, prompt_set) for prompt_set in ("plain", "unrelated") for name in ("style.descriptor", "align.clip")
    ]
    return Evaluation(
        title="Chalk style",
        adapter="runs/chalk/adapter",
        base_model="genmo/mochi-1-preview",
        quick=False,
        incomparable=(),
        backbones={"subject": "facebook/dinov2-base, revision f9e44c8", "style": "yuxi-liu-wired/CSD, revision 0f1a2b3"},
        settings={
            "prompts per set": "30",
            "seeds per prompt": "2",
            "frames": "37",
            "size": "480 x 848",
            "steps": "64",
            "guidance scale": "4.5",
            "torch": "2.13.0",
            "command": "mochi-lora evaluate --config chalk.yaml --adapter runs/chalk/adapter",
        },
        verdict=Verdict(
            headline="It worked: the style is clearly there, and neither the pictures nor their content suffered.",
            worked=True,
            reasons=(
                "Style: far more similar to the references than the base model's clips, on 93 % of the prompts.",
                "Prompts: followed as well as before; any loss is smaller than the loss allowed.",
                "Pictures: as steady as before, with a little less motion.",
            ),
            advice=(
                "Sample at strength 0.75: nearly all of the style, and more of the content stays as it was.",
                "Training could have stopped at step 400: later checkpoints follow prompts less well.",
            ),
        ),
        comparisons=tuple(rows),
        missing=(Missing("align.judge", "no judge is configured (evaluation.backbones.judge is null)"),),
        bleed=(
            Bleed("plain", Interval(0.08, 0.02, 0.15), 0.93),
            Bleed("unrelated", Interval(0.03, -0.02, 0.08), 0.97),
        ),
        memorisation=memorisation(Path("here")),
        sweep=sweep(),
        curve=curve(),
        losses=losses(),
        pairs=pairs(),
    )


def quick() -> Evaluation:
    """A quick look with the built-in networks, in the drawn world."""
    rows = tuple(
        comparison(name, conclusion="indicative", p_value=None, p_adjusted=None, prompts=8)
        for name in ("quality.subject_consistency", "align.clip", "style.descriptor", "quality.motion_amount")
    )
    verdict = Verdict("The style seems to be there; run the full evaluation to be sure.", None, ("Style: up.",), ())
    return replace(
        worked(),
        quick=True,
        incomparable=tuple(row.measure for row in rows if row.measure != "quality.motion_amount"),
        verdict=verdict,
        comparisons=rows,
        bleed=(),
        memorisation=None,
        curve=None,
        losses=(),
        pairs=tuple(pair for pair in pairs() if pair.prompt_set == "trigger"),
        missing=(Missing("memorisation", "a quick look leaves it out"), Missing("curve", "a quick look leaves it out")),
        truth={
            "style score": (0.04, 0.71),
            "right shape": (0.94, 0.91),
            "right colour": (0.97, 0.97),
            "right motion": (0.9, 0.84),
        },
    )


def memorises() -> Evaluation:
    """The style is there because the training clips are."""
    verdict = Verdict(
        "Warning: it replays its training clips; the style score says little.",
        worked=False,
        reasons=("42 % of its clips are nearer to a training clip than two training clips are to each other.",),
        advice=("Train less: set train.steps to about 200.", "Add more clips, or raise objective.caption_dropout to 0.2."),
    )
    return replace(worked(), verdict=verdict, memorisation=memorisation(Path("here"), "memorises"))


def missing_parts() -> Evaluation:
    """No style reference, one clip per band, values nobody could compute."""
    one = Interval(0.5, float("nan"), float("nan"))
    return replace(
        worked(),
        verdict=Verdict("Whether it worked cannot be said: the style was not measured.", None, (), ()),
        comparisons=tuple(comparison(name) for name in NUMBERS if MEASURES[name].axis != "style"),
        missing=(
            Missing("style.descriptor", "its network could not be loaded: no such folder"),
            Missing("bleed", "style is missing"),
        ),
        bleed=(),
        sweep=Sweep((StrengthPoint(0.0, {}), StrengthPoint(1.0, {"align.clip": 0.28})), None, None),
        curve=Curve(
            (CheckpointPoint(100, "a", {}, admissible=False, held_out_loss=None),), None, "No checkpoint has a style score."
        ),
        losses=(BandLoss(0.5, one, one, one, one),),
        memorisation=memorisation(None),
    )


def nothing() -> Evaluation:
    """The command ended with no number at all."""
    return Evaluation(
        title="Nothing",
        adapter="a",
        base_model="b",
        quick=False,
        incomparable=(),
        backbones={},
        settings={},
        verdict=Verdict("Nothing could be measured.", None, (), ()),
        comparisons=(),
        missing=tuple(Missing(name, "no video could be read") for name in ("style.descriptor", "sweep", "bleed")),
    )


VARIANTS = {function.__name__: function for function in (worked, quick, memorises, missing_parts, nothing)}


def scene(index: int) -> Scene:
    return draw_scene(7, index, held_out=False)


def write_files(folder: Path, evaluation: Evaluation) -> None:
    """Draw the videos and pictures that `evaluation` names."""
    for index, pair in enumerate(evaluation.pairs):
        style = "chalk" if pair.prompt_set == "trigger" else "base"
        write_mp4(folder / pair.base_video, render(scene(index), "base"))
        write_mp4(folder / pair.adapter_video, render(scene(index), style))
    for row in evaluation.memorisation.nearest if evaluation.memorisation else ():
        if row.picture:
            (folder / row.picture).parent.mkdir(parents=True, exist_ok=True)
            frames = [render(scene(index), "chalk")[0] for index in (1, 2)]
            Image.fromarray(np.concatenate(frames, axis=1)).save(folder / row.picture)

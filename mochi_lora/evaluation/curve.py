"""One point per checkpoint, and which one to keep: the most style among those that lost nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mochi_lora.evaluation.paired import BASE, Design, oriented, pair, select
from mochi_lora.evaluation.results import CheckpointPoint, Curve, Row
from mochi_lora.evaluation.statistics import ALPHA, bootstrap_interval, non_inferiority_p, prompts_needed
from mochi_lora.measures.catalogue import MEASURES


@dataclass(frozen=True)
class CheckpointClips:
    """Which rows belong to which checkpoint."""

    step: int
    label: str  # Row.adapter of its clips
    adapter: str  # path of the adapter file
    held_out_loss: float | None = None


def curve(rows: Sequence[Row], checkpoints: Sequence[CheckpointClips], design: Design) -> Curve:
    """Means over the trigger prompts at strength 1, and the recommendation.

    Admissible is a checkpoint whose quality and alignment primaries both pass their non-inferiority test at 0.05. Both must
    pass, so neither is adjusted (intersection-union test); among checkpoints nothing is adjusted either: this picks a file,
    the comparison is what concludes.
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    points = tuple(_point(rows, checkpoint, design) for checkpoint in ordered)
    best, because = _recommend(rows, ordered, points, design)
    return Curve(points, best.adapter if best else None, because)


def _point(rows: Sequence[Row], checkpoint: CheckpointClips, design: Design) -> CheckpointPoint:
    base, ours = select(rows, "trigger", BASE), select(rows, "trigger", checkpoint.label)
    values, passed = {}, []
    for measure in MEASURES:
        paired = pair(base, ours, measure)
        if not paired.prompts or paired.left_out:
            continue
        values[measure] = float(paired.adapter.mean())
        if measure in (design.primaries.get("quality"), design.primaries.get("alignment")):
            better = oriented(measure, paired.differences)
            passed.append(non_inferiority_p(better, design.margins[measure], design.seed) <= ALPHA)
    admissible = len(passed) == 2 and all(passed)
    return CheckpointPoint(checkpoint.step, checkpoint.adapter, values, admissible, checkpoint.held_out_loss)


def _recommend(
    rows: Sequence[Row], checkpoints: Sequence[CheckpointClips], points: Sequence[CheckpointPoint], design: Design
) -> tuple[CheckpointPoint | None, str]:
    if obstacle := _obstacle(rows, checkpoints, points, design):
        return None, obstacle
    style = design.primaries["style"]
    admissible = [point for point in points if point.admissible and style in point.values]
    if not admissible:
        return None, "no checkpoint was shown to keep both alignment and quality within their margins"
    best = max(admissible, key=lambda point: (_style(point, style), -point.step))
    because = f"step {best.step} has the most style among the {len(admissible)} of {len(points)} checkpoints that keep "
    because += "alignment and quality within their margins"
    labels = {checkpoint.adapter: checkpoint.label for checkpoint in checkpoints}
    for earlier in (point for point in admissible if point.step < best.step):
        if _is_alike(rows, labels[earlier.adapter], labels[best.adapter], design):
            return best, f"{because}; step {earlier.step} cannot be told from it with these prompts"
    return best, because


def _obstacle(
    rows: Sequence[Row], checkpoints: Sequence[CheckpointClips], points: Sequence[CheckpointPoint], design: Design
) -> str | None:
    """Why nothing can be recommended, whatever the numbers are."""
    if not points:
        return "there are no checkpoints to choose from"
    for axis in ("style", "alignment", "quality"):
        measure = design.primaries.get(axis)
        if measure is None:
            return f"no measure of {axis} was agreed on to choose by"
        if all(measure not in point.values for point in points):
            return f"no checkpoint has {measure} for all its prompts"
    prompts = len({row.prompt for checkpoint in checkpoints for row in select(rows, "trigger", checkpoint.label)})
    if prompts < (fewest := prompts_needed(1, two_sided=False)):
        return f"{prompts} prompts cannot show that nothing else got worse; {fewest} are the fewest that can"
    return None


def _style(point: CheckpointPoint, style: str) -> float:
    return float(oriented(style, np.array(point.values[style])))


def _is_alike(rows: Sequence[Row], earlier: str, later: str, design: Design) -> bool:
    """The interval of the difference in style holds 0."""
    differences = pair(select(rows, "trigger", earlier), select(rows, "trigger", later), design.primaries["style"]).differences
    interval = bootstrap_interval(differences, design.seed, design.resamples)
    return interval.low <= 0 <= interval.high

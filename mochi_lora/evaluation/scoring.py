"""From videos to the numbers of each clip. One network at a time is in memory; a network that cannot be had is a `Missing`."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from mochi_lora.config.schema import BackbonesConfig
from mochi_lora.console import console
from mochi_lora.errors import UserError
from mochi_lora.evaluation.footage import Clip, Footage
from mochi_lora.evaluation.grid import Cell
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.results import Missing, Row
from mochi_lora.measures.aesthetic_head import TOWER, load_aesthetic_head
from mochi_lora.measures.alignment import placed
from mochi_lora.measures.backbones import (
    BUILTIN_STYLE,
    load_aligner,
    load_image_encoder,
    load_style,
    load_vision_language_judge,
)
from mochi_lora.measures.consistency import consistency
from mochi_lora.measures.encoders import Aligner, ImageEncoder
from mochi_lora.measures.similarity import content_kept, diversity
from mochi_lora.measures.style import reference_similarity

_Network = TypeVar("_Network", ImageEncoder, Aligner)


@dataclass
class Scores:
    """What has been measured so far."""

    clips: dict[str, Clip]  # by path relative to the evaluation's folder
    values: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))  # the same for every cell of a video
    own: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))  # by position of the cell
    missing: list[Missing] = field(default_factory=list)
    backbones: dict[str, str] = field(default_factory=dict)  # role -> name and revision
    incomparable: set[str] = field(default_factory=set)  # measures of built-in networks
    background: dict[str, np.ndarray] = field(default_factory=dict)  # embeddings per video and, below, per reference clip
    references: list[np.ndarray] = field(default_factory=list)

    def rows(self, cells: Sequence[Cell]) -> tuple[Row, ...]:
        """Every cell with its numbers."""
        return tuple(cell.row({**self.values[cell.shot.video], **self.own[at]}) for at, cell in enumerate(cells))


def looks(backbones: BackbonesConfig, clips: int, references: int) -> int:
    """How often a clip is looked at in all: what a progress bar counts."""
    optional = (backbones.text, backbones.video_text, backbones.aesthetic, backbones.judge)
    own_gram = backbones.style != BUILTIN_STYLE
    return clips * (4 + own_gram + sum(name is not None for name in optional)) + references * (2 + own_gram)


def score(
    cells: Sequence[Cell], folder: Path, references: Sequence[Clip], footage: Footage, backbones: BackbonesConfig, device: str
) -> Scores:
    """Measure every cell's video in `folder`. Raises UserError for an unreadable video or a prompt an aligner refuses."""
    scores = Scores({cell.shot.video: Clip.open(folder / cell.shot.video) for cell in cells})
    _motion(scores, footage)
    _subject(scores, cells, footage, backbones, device)
    _background(scores, references, footage, backbones, device)
    _style(scores, references, footage, backbones, device)
    _alignment(scores, cells, footage, backbones, device)
    if backbones.aesthetic is not None:
        _aesthetic(scores, footage, Path(backbones.aesthetic), device)
    return scores


def _had(scores: Scores, footage: Footage, role: str, measures: Sequence[str], load: Callable[[], _Network]) -> _Network | None:
    """What `load` gives, noted under its role; None, noted as missing, where the first process cannot have it.

    Raises UserError where only another one cannot: it would owe the first its share.
    """
    network, refusal = None, None
    try:
        network = load()
    except UserError as error:
        refusal = error
    (first,) = footage.share([lambda: refusal])
    if first is None and refusal is not None:
        raise refusal
    if first is not None or network is None:
        console.print(f"not measured ({role}): {first}", style="yellow", markup=False)
        scores.missing += [Missing(measure, str(first)) for measure in measures]
        return None
    scores.backbones[role] = network.name
    if not network.comparable:
        scores.incomparable |= set(measures)
    return network


def _note(scores: Scores, measures: Sequence[str], lack: Collection[object], among: Collection[object], why: str) -> None:
    """Missing for `measures`, where something of `among` lacks them; `why` goes on after "3 of 8 clips"."""
    others = "; the others are measured" if len(lack) < len(among) else ""
    if lack:
        scores.missing += [Missing(measure, f"{len(lack)} of {len(among)} clips {why}{others}") for measure in measures]


def _motion(scores: Scores, footage: Footage) -> None:
    still = set()
    for video, found in zip(scores.clips, footage.motion(scores.clips.values()), strict=True):
        if found is None:
            still.add(video)
            continue
        scores.values[video]["quality.warp_error"] = found.warp_error
        scores.values[video]["quality.motion_smoothness"] = found.motion_smoothness
        scores.values[video]["quality.motion_amount"] = found.motion_amount
    measures = ("quality.warp_error", "quality.motion_smoothness", "quality.motion_amount")
    _note(scores, measures, still, scores.clips, "have fewer than three frames")


def _subject(scores: Scores, cells: Sequence[Cell], footage: Footage, backbones: BackbonesConfig, device: str) -> None:
    """Subject consistency of each clip; content drift from the base; diversity among the seeds of a prompt."""
    measures = ("quality.subject_consistency", "drift.content", "diversity")
    encoder = _had(scores, footage, "subject", measures, partial(load_image_encoder, backbones.subject, device))
    if encoder is None:
        return
    embedded = dict(zip(scores.clips, footage.embed(encoder, scores.clips.values()), strict=True))
    _consistency(scores, "quality.subject_consistency", embedded)
    _drift(scores, cells, embedded)
    _diversity(scores, cells, embedded)


def _consistency(scores: Scores, measure: str, embedded: Mapping[str, np.ndarray]) -> None:
    for video, frames in embedded.items():
        if len(frames) > 1:
            scores.values[video][measure] = consistency(frames)
    _note(
        scores, (measure,), {video for video, frames in embedded.items() if len(frames) == 1}, embedded, "have one frame only"
    )


def _drift(scores: Scores, cells: Sequence[Cell], embedded: Mapping[str, np.ndarray]) -> None:
    bases = {_place(cell): cell.shot.video for cell in cells if cell.label == BASE}
    others, compared = set(), set()
    for at, cell in enumerate(cells):
        base = bases.get(_place(cell))
        if cell.label == BASE or base is None:
            continue
        compared.add(cell.shot.video)
        if len(embedded[cell.shot.video]) == len(embedded[base]):
            scores.own[at]["drift.content"] = content_kept(embedded[base], embedded[cell.shot.video])
        else:
            others.add(cell.shot.video)
    _note(scores, ("drift.content",), others, compared, "of the adapter have another number of frames than the base's")


def _diversity(scores: Scores, cells: Sequence[Cell], embedded: Mapping[str, np.ndarray]) -> None:
    siblings = defaultdict(set)
    for cell in cells:
        siblings[_siblings(cell)].add(cell.shot.video)
    alone, uneven = set(), set()
    for at, cell in enumerate(cells):
        seeds = [embedded[video] for video in sorted(siblings[_siblings(cell)])]
        if len({len(frames) for frames in seeds}) > 1:
            uneven.add(cell.shot.video)
        elif (varied := diversity(seeds)) is None:
            alone.add(cell.shot.video)
        else:
            scores.own[at]["diversity"] = varied
    _note(scores, ("diversity",), alone, embedded, "are of a prompt with one seed, and diversity is between seeds")
    _note(scores, ("diversity",), uneven, embedded, "have another number of frames than those of the same prompt's other seeds")


def _place(cell: Cell) -> tuple[str, str, int]:
    return cell.prompt_set, cell.shot.prompt, cell.shot.seed


def _siblings(cell: Cell) -> tuple[str, str, str, float]:
    return cell.prompt_set, cell.shot.prompt, cell.label, cell.strength


def _background(scores: Scores, references: Sequence[Clip], footage: Footage, backbones: BackbonesConfig, device: str) -> None:
    measure = "quality.background_consistency"
    load = partial(load_image_encoder, backbones.background, device)
    encoder = _had(scores, footage, "background", (measure, "style.distance"), load)
    if encoder is None:
        return
    scores.background = dict(zip(scores.clips, footage.embed(encoder, scores.clips.values()), strict=True))
    scores.references = footage.embed(encoder, references)
    if encoder.name == scores.backbones.get("subject"):
        same = "backbones.background is the network of backbones.subject: on the same frames it gives the same number"
        scores.missing.append(Missing(measure, same))
        return
    _consistency(scores, measure, scores.background)


def _style(scores: Scores, references: Sequence[Clip], footage: Footage, backbones: BackbonesConfig, device: str) -> None:
    """Similarity to the references by the configured descriptor, and by Gram statistics where those are another."""
    roles = {"style": ("style.descriptor", backbones.style)}
    if backbones.style != BUILTIN_STYLE:
        roles["texture"] = ("style.gram", BUILTIN_STYLE)
    for role, (measure, name) in roles.items():
        if not references:
            scores.missing.append(Missing(measure, "there are no reference clips: give evaluation.references or data.clips"))
            continue
        encoder = _had(scores, footage, role, (measure,), partial(load_style, name, device))
        if encoder is None:
            continue
        shown = np.concatenate(footage.embed(encoder, references))
        for video, frames in zip(scores.clips, footage.embed(encoder, scores.clips.values()), strict=True):
            scores.values[video][measure] = reference_similarity(frames, shown)


def _alignment(scores: Scores, cells: Sequence[Cell], footage: Footage, backbones: BackbonesConfig, device: str) -> None:
    contents = {cell.shot.video: cell.content for cell in cells}
    rivals: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        rivals[cell.shot.video] |= {other.content for other in cells if other.prompt_set == cell.prompt_set}
    told = {video: [contents[video], *sorted(rivals[video] - {contents[video]})] for video in scores.clips}
    for role, measure, name in (("text", "align.clip", backbones.text), ("video text", "align.video", backbones.video_text)):
        if name is None:
            continue
        measures = (measure, *_places(measure))
        aligner = _had(scores, footage, role, measures, partial(load_aligner, name, device))
        if aligner is not None:
            _ranked(scores, measure, _aligned(scores, footage, aligner, measure, told))
    if backbones.text is backbones.video_text is None:
        because = "backbones.text and backbones.video_text are null: set one of them"
        scores.missing.append(Missing("align.video", because))
    if backbones.judge is not None:
        judge = _had(scores, footage, "judge", ("align.judge",), partial(load_vision_language_judge, backbones.judge, device))
        if judge is not None:
            _aligned(scores, footage, judge, "align.judge", {video: row[:1] for video, row in told.items()})


def _places(measure: str) -> tuple[str, str]:
    return f"{measure}_first", f"{measure}_rank"


def _ranked(scores: Scores, measure: str, found: Sequence[np.ndarray]) -> None:
    """Each clip's own prompt among those of its prompt set."""
    first, rank = _places(measure)
    alone = set()
    for video, row in zip(scores.clips, found, strict=True):
        if len(row) == 1:
            alone.add(video)
            continue
        place = placed(row, 0)
        scores.values[video] |= {first: place.first, rank: place.rank}
    _note(scores, (first, rank), alone, scores.clips, "have no other prompt in their set to be ranked against")


def _aligned(
    scores: Scores, footage: Footage, aligner: Aligner, measure: str, told: Mapping[str, Sequence[str]]
) -> list[np.ndarray]:
    """Scores with all of a clip's prompts; its own, the first, is the measure."""
    clips = scores.clips
    if cut := aligner.truncated(sorted({prompts[0] for prompts in told.values()})):
        console.print(f"{measure}: {cut} prompts are longer than {aligner.name} reads; their endings are cut", markup=False)
    found = footage.align(aligner, list(clips.values()), [told[video] for video in clips])
    for video, row in zip(clips, found, strict=True):
        scores.values[video][measure] = float(row[0])
    return found


def _aesthetic(scores: Scores, footage: Footage, path: Path, device: str) -> None:
    measure = "quality.aesthetic"
    head = load_aesthetic_head(path)  # a path that somebody wrote: an error, not a gap
    encoder = _had(scores, footage, "aesthetic", (measure,), partial(load_image_encoder, TOWER, device))
    if encoder is None:
        return
    for video, frames in zip(scores.clips, footage.embed(encoder, scores.clips.values()), strict=True):
        scores.values[video][measure] = float(head.scores(frames).mean())

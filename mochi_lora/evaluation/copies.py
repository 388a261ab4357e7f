"""Does the adapter replay its training clips? Its videos and the base's, each against every training clip."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mochi_lora.evaluation.footage import Clip, Footage
from mochi_lora.evaluation.grid import ADAPTER, Cell
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.results import Memorisation, Missing, Neighbour
from mochi_lora.files import write_atomic
from mochi_lora.measures.memorisation import Nearest, clip_similarity, copy_threshold, nearest

PICTURES = "nearest"
_SHOWN = 6  # neighbours with a picture
_PICTURE_HEIGHT = 160
# More of its clips than of the base's, as a share of all. Of a healthy adapter's clips of the same words a few percent
# pass the threshold by chance; one that replays flags nearly all on its own captions.
_BEYOND_BASE = 0.25
_BEYOND_CHANCE = 3  # videos: of a handful, one or two pass by chance


@dataclass(frozen=True)
class _Found:
    """One generated clip and its nearest training clip."""

    cell: Cell
    clip: Clip
    nearest: Nearest


def memorisation(
    cells: Sequence[Cell], folder: Path, training: Sequence[Clip], footage: Footage, pictures: str = PICTURES
) -> Memorisation | Missing:
    """Compare base and adapter (strength 1) on prompts of training clips, or on trigger prompts where none were made.

    Copies are looked for by layout, coarse thumbnails: measured on this project's clips, embeddings of objects rate a copy
    and a new clip of the same words alike. Writes pictures of the nearest pairs under `folder`/`pictures`. Missing
    without training clips, or where they are one piece of footage and nothing shows how alike different clips are.
    """
    if not training:
        return Missing("memorisation", "no training clip could be read (data.clips)")
    chosen = _chosen(cells)
    if not chosen:
        return Missing("memorisation", "no video of the adapter on a trigger prompt or a training caption was made")
    references = footage.layouts(training)
    sides = {
        label: _searched([cell for cell in chosen if cell.label == label], folder, references, footage)
        for label in (BASE, ADAPTER)
    }
    threshold = copy_threshold(references, [found.nearest.similarity for found in sides[BASE]])
    shares = {label: _share(found, threshold) for label, found in sides.items()}
    ranked = sorted(sides[ADAPTER], key=lambda found: -found.nearest.similarity)
    beyond = shares[ADAPTER] - shares[BASE]
    enough = beyond * len(ranked) > min(_BEYOND_CHANCE, len(ranked)) - 0.5  # half a video: shares are rounded
    return Memorisation(
        flagged_share=shares[ADAPTER],
        base_flagged_share=shares[BASE],
        threshold=threshold,
        calibration=_calibration(len(training), len(sides[BASE])),
        nearest=tuple(
            _neighbour(found, training, threshold, folder, footage, f"{pictures}/{at}.png" if at < _SHOWN else None)
            for at, found in enumerate(ranked)
        ),
        motion_similarity=_motion_similarity(ranked, training, footage),
        conclusion="memorises" if beyond >= _BEYOND_BASE and enough else "does not memorise",
    )


def copy_looks(cells: Sequence[Cell], training: int) -> int:
    """How often a clip is looked at in all: what a progress bar counts."""
    chosen = _chosen(cells) if training else []
    return training + len(chosen) + 2 * sum(cell.label == ADAPTER for cell in chosen) if chosen else 0


def _chosen(cells: Sequence[Cell]) -> list[Cell]:
    main = [cell for cell in cells if cell.is_compared]
    own = [cell for cell in main if cell.prompt_set == "training"]
    return own or [cell for cell in main if cell.prompt_set == "trigger"]


def _searched(cells: Sequence[Cell], folder: Path, references: Sequence[np.ndarray], footage: Footage) -> list[_Found]:
    clips = [Clip.open(folder / cell.shot.video) for cell in cells]
    layouts = footage.layouts(clips)
    return [_Found(cell, clip, nearest(rows, references)) for cell, clip, rows in zip(cells, clips, layouts, strict=True)]


def _share(found: Sequence[_Found], threshold: float) -> float:
    return float(np.mean([one.nearest.similarity > threshold for one in found])) if found else 0.0


def _calibration(training: int, base: int) -> str:
    return (
        f"Half-way between how alike different clips are (the {training} training clips among themselves, and the base's "
        f"{base} videos against them) and how alike two halves of one clip are."
    )


def _motion_similarity(ranked: Sequence[_Found], training: Sequence[Clip], footage: Footage) -> float | None:
    """Mean cosine of flow directions of the adapter's clips and their nearest training clips; None where nothing moves."""
    if not ranked:
        return None
    own = footage.motion([found.clip for found in ranked])
    theirs = footage.motion([training[found.nearest.clip] for found in ranked])
    pairs = [(a.directions[None], b.directions[None]) for a, b in zip(own, theirs, strict=True) if a and b]
    moving = [clip_similarity(a, b) for a, b in pairs if a.any() and b.any()]
    return float(np.mean(moving)) if moving else None


def _neighbour(
    found: _Found, training: Sequence[Clip], threshold: float, folder: Path, footage: Footage, picture: str | None
) -> Neighbour:
    twin = training[found.nearest.clip]
    if picture:
        _write_pair(
            folder / picture,
            _frame(found.clip, found.nearest.frame, footage),
            _frame(twin, found.nearest.training_frame, footage),
        )
    return Neighbour(
        video=found.cell.shot.video,
        prompt=found.cell.shot.prompt,
        training_clip=twin.name,
        similarity=found.nearest.similarity,
        ratio=found.nearest.ratio,
        flagged=found.nearest.similarity > threshold,
        picture=picture,
    )


def _frame(clip: Clip, look: int, footage: Footage) -> Image.Image:
    """Frame `look` of those that were looked at."""
    (pixels,) = clip.frames([footage.layout_frames(clip)[look]])
    frame = Image.fromarray(pixels)
    return frame.resize((max(1, round(_PICTURE_HEIGHT * frame.width / frame.height)), _PICTURE_HEIGHT))


def _write_pair(path: Path, left: Image.Image, right: Image.Image) -> None:
    sheet = Image.new("RGB", (left.width + 8 + right.width, _PICTURE_HEIGHT), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 8, 0))
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))

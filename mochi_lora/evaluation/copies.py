"""Does the adapter replay its training clips? Its videos and the base's on some prompts, each against the clips given."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mochi_lora.evaluation.footage import Clip, Footage
from mochi_lora.evaluation.grid import ADAPTER, Cell
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.results import Memorisation, Missing, Neighbour, PromptSet
from mochi_lora.files import write_atomic
from mochi_lora.measures.memorisation import (
    Gallery,
    Nearest,
    between,
    clip_similarity,
    copy_threshold,
    even_to_odd,
    nearest,
)

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
    cells: Sequence[Cell],
    folder: Path,
    training: Sequence[Clip],
    footage: Footage,
    pictures: str | None = PICTURES,
    *,
    told: str | None = None,
) -> Memorisation | Missing:
    """Compare base and adapter (strength 1) on prompts of training clips, or on trigger prompts where none were made.

    Copies are looked for by layout, coarse thumbnails: measured on this project's clips, embeddings of objects rate a copy
    and a new clip of the same words alike. Writes pictures of the nearest pairs under `folder`/`pictures`; None writes none.
    Missing without training clips, or where they are one piece of footage and no video of the base shows how alike different
    clips are. `told` says how many training clips there are, where not all are in `training`.
    """
    if not training:
        return Missing("memorisation", "no training clip could be read (data.clips)")
    chosen = _chosen(cells)
    if not chosen:
        return Missing("memorisation", "no video of the adapter on a trigger prompt or a training caption was made")
    clips = [Clip.open(folder / cell.shot.video) for cell in chosen]
    aspect = Counter(clip.aspect for clip in clips).most_common(1)[0][0]
    gallery = Gallery.of(footage.thumbnails(training, aspect))
    every = _searched(chosen, clips, footage.thumbnails(clips, aspect), gallery, footage)
    sides = {label: [found for found in every if found.cell.label == label] for label in (BASE, ADAPTER)}
    threshold = _threshold(gallery, [found.nearest.similarity for found in sides[BASE]], footage)
    if threshold is None:
        because = "the training clips are one piece of footage and there is no video of the base: nothing shows how alike"
        return Missing("memorisation", f"{because} different clips are")
    shares = {label: _share(found, threshold) for label, found in sides.items()}
    ranked = sorted(sides[ADAPTER], key=lambda found: -found.nearest.similarity)
    beyond = shares[ADAPTER] - shares[BASE]
    shown = _SHOWN if pictures else 0
    enough = beyond * len(ranked) > min(_BEYOND_CHANCE, len(ranked)) - 0.5  # half a video: shares are rounded
    return Memorisation(
        flagged_share=shares[ADAPTER],
        base_flagged_share=shares[BASE],
        threshold=threshold,
        calibration=_calibration(len(training), len(sides[BASE])),
        nearest=tuple(
            _neighbour(found, training, threshold, folder, footage, f"{pictures}/{at}.png" if at < shown else None)
            for at, found in enumerate(ranked)
        ),
        motion_similarity=_motion_similarity(ranked, training, footage),
        conclusion="memorises" if beyond >= _BEYOND_BASE and enough else "does not memorise",
        prompt_set=chosen[0].prompt_set,
        scope=_scope(chosen[0].prompt_set, len(ranked), told or str(len(training))),
    )


def copy_looks(cells: Sequence[Cell], training: int) -> int:
    """How often a clip is looked at in all: what a progress bar counts."""
    chosen = _chosen(cells) if training else []
    both = 2 * (training + len(chosen))  # thumbnails, and the search among them
    return both + 2 * sum(cell.label == ADAPTER for cell in chosen) if chosen else 0


def _chosen(cells: Sequence[Cell]) -> list[Cell]:
    main = [cell for cell in cells if cell.is_compared]
    own = [cell for cell in main if cell.prompt_set == "training"]
    return own or [cell for cell in main if cell.prompt_set == "trigger"]


def _searched(
    cells: Sequence[Cell], clips: Sequence[Clip], thumbnails: Sequence[np.ndarray], gallery: Gallery, footage: Footage
) -> list[_Found]:
    found = footage.each([partial(nearest, small, gallery) for small in thumbnails])
    return [_Found(*one) for one in zip(cells, clips, found, strict=True)]


def _threshold(gallery: Gallery, base: Sequence[float], footage: Footage) -> float | None:
    among = footage.each([partial(between, gallery, own) for own in range(len(gallery.thumbnails))])
    return copy_threshold(np.stack(among), [even_to_odd(clip) for clip in gallery.thumbnails], base)


def _share(found: Sequence[_Found], threshold: float) -> float:
    return float(np.mean([one.nearest.similarity > threshold for one in found])) if found else 0.0


def _scope(prompt_set: PromptSet, videos: int, training: str) -> str:
    asked = "captions of training clips, where a copy is likeliest to show" if prompt_set == "training" else "trigger prompts"
    return f"Looked at were {videos} videos of the adapter on {asked}, each against the training clips ({training})."


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

"""The parts of a data set: `data.mix` entry by entry, or `data.clips` as the only one; their clips, and their draws.

How often a clip comes: part s has n_s clips to train on, repeats r_s and, if weights are given, weight w_s. Without weights
an epoch draws from s D_s = n_s r_s times. With weights the D_s are in the proportion of the w_s (rounded) and the epoch is
the shortest in which every part gets its repeats: D_s = round(w_s max_t(n_t r_t / w_t)), so that D_s >= n_s r_s.
A part's draws are spread over its shapes in proportion to their clips, and over the clips of a shape evenly: counts
differ by at most one, and which clips get the one more changes from epoch to epoch (`data.plan`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mochi_lora.config.schema import DataConfig
from mochi_lora.data.clip_plan import Shapes
from mochi_lora.data.plan import Pool
from mochi_lora.data.sources import ClipSource, Found, list_sources
from mochi_lora.data.trigger import calls
from mochi_lora.errors import UserError
from mochi_lora.spec import Bucket

_MOST_DRAWS = 10_000_000  # per epoch


@dataclass(frozen=True)
class Part:
    """One folder or table with its settings."""

    number: int  # place in data.mix; 0 for data.clips
    clips: Path
    shapes: Shapes
    trigger: str = ""
    repeats: int = 1
    weight: float | None = None


def parts_of(data: DataConfig) -> tuple[Part, ...]:
    """The entries of `data.mix` with what they leave out filled in, or `data.clips`."""
    shapes = Shapes(tuple(Bucket.parse(text) for text in data.buckets), data.upscale)
    if not data.mix:
        return (Part(0, data.clips, shapes),)
    return tuple(
        Part(
            number=number,
            clips=entry.clips,
            shapes=Shapes(
                tuple(Bucket.parse(text) for text in entry.buckets) if entry.buckets is not None else shapes.buckets,
                shapes.upscale if entry.upscale is None else entry.upscale,
            ),
            trigger=entry.trigger.strip(" ,."),  # a comma is put behind it
            repeats=entry.repeats,
            weight=entry.weight,
        )
        for number, entry in enumerate(data.mix)
    )


def where_of(data: DataConfig) -> str:
    """For people: which setting names the clips, and what it says."""
    if not data.mix:
        return f"data.clips={data.clips}"
    return f"data.mix of {', '.join(str(entry.clips) for entry in data.mix)}"


def list_part(part: Part, data: DataConfig) -> Found:
    """`list_sources` of one part, its trigger put before the captions that do not call it."""
    try:
        sources, rejections = list_sources(part.clips)
    except UserError as error:
        if not data.mix:
            raise
        raise UserError(f"data.mix[{part.number}]: {str(error).removeprefix('data.clips: ')}") from error
    return [_triggered(source, part.trigger) for source in sources], rejections


def _triggered(source: ClipSource, trigger: str) -> ClipSource:
    if calls(source.caption, trigger):
        return source
    return replace(source, caption=f"{trigger}, {source.caption}")


def pools_of(buckets: Sequence[Bucket], owners: Sequence[int], parts: Sequence[Part]) -> tuple[Pool, ...]:
    """An epoch's draws: item i has shape `buckets[i]` and belongs to part `owners[i]`. See the top of this room.

    Parts without items are left out and the weights of the others count among themselves. Raises UserError where weights
    and numbers of clips ask for an epoch beyond ten million draws.
    """
    counts = Counter(owners)
    draws = _draws(counts, {part.number: part for part in parts})
    pools = []
    for owner in sorted(counts):
        mine = [item for item, its in enumerate(owners) if its == owner]
        shapes = sorted({buckets[item] for item in mine})
        groups = [tuple(item for item in mine if buckets[item] == shape) for shape in shapes]
        shares = _apportioned(draws[owner], [len(group) for group in groups])
        pools += [Pool(shape, group, share) for shape, group, share in zip(shapes, groups, shares, strict=True)]
    return tuple(pools)


def _draws(counts: Mapping[int, int], parts: Mapping[int, Part]) -> dict[int, int]:
    least = {owner: count * parts[owner].repeats for owner, count in counts.items()}
    weights = {owner: parts[owner].weight for owner in counts}
    known = {owner: weight for owner, weight in weights.items() if weight is not None}
    if not known:
        return least
    assert len(known) == len(weights), "the schema wants a weight on every entry or on none"
    scale = max(least[owner] / weight for owner, weight in known.items())
    total = scale * sum(known.values())
    if total > _MOST_DRAWS:
        scarce = parts[max(known, key=lambda owner: least[owner] / known[owner])]
        raise UserError(
            f"data.mix: to see each of the {counts[scarce.number]} clips of {scarce.clips} {scarce.repeats} times at weight "
            f"{scarce.weight:g}, an epoch would have {total:.3g} samples; raise that weight, or lower its repeats"
        )
    return {owner: max(least[owner], round(weight * scale)) for owner, weight in known.items()}


def _apportioned(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in whole numbers in proportion to `sizes`, by the largest remainder; ties go to the earlier."""
    whole = sum(sizes)
    shares = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda place: -(total * sizes[place] % whole))
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares

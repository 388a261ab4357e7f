"""`mochi-lora encode --plan`: what each clip would become, before any GPU is touched. Loads no model, decodes no clip."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mochi_lora.commands.encode_split import tell_planned_split
from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table, progress_bar
from mochi_lora.data.ahead import begun_ahead, threads_to_read
from mochi_lora.data.clip_plan import ClipPlan, plan_clip
from mochi_lora.data.index import index_path
from mochi_lora.data.known_files import KnownFiles
from mochi_lora.data.mix import Part, list_part, parts_of, pools_of, where_of
from mochi_lora.data.sources import ClipSource, Rejection
from mochi_lora.errors import ClipError, UserError
from mochi_lora.files import write_text
from mochi_lora.runs.called import Called
from mochi_lora.spec import Bucket

Planned = tuple[Part, ClipPlan]
Refused = tuple[Part, Rejection]
_MOST_ROWS = 40  # of the table by clip


def run(config: Config, *, called: Called = Called()) -> None:  # noqa: B008 - frozen
    """Plan everything the configuration names; prints tables and writes a line per clip beside the index."""
    parts, plans, refused = plan_everything(config)
    path = index_path(config.data).with_suffix(".plan.jsonl")
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(plans, refused)))
    _print_clips([plan for _, plan in plans], path)
    _print_shapes([plan for _, plan in plans])
    _print_parts(parts, plans, refused)
    buckets, owners = [plan.bucket for _, plan in plans], [part.number for part, _ in plans]
    tell_added(parts, buckets, owners)
    if refused:
        print_table("left out", ("clip", "reason"), [(item.name, item.reason) for _, item in refused])
    console.print(f"plan     {path}", markup=False)
    if not plans:
        raise UserError(f"{where_of(config.data)}: no clip could be used; the table above says why for each")
    tell_planned_split([plan.source for _, plan in plans], config.data.validation_fraction)
    if config.data.mix:
        print_draws(parts, buckets, owners)
    called.say_next("encode")


def plan_everything(config: Config) -> tuple[tuple[Part, ...], list[Planned], list[Refused]]:
    """What becomes of every clip that the configuration names: the parts, the plans, the clips left out. Shows its progress."""
    parts = parts_of(config.data)
    plans: list[Planned] = []
    refused: list[Refused] = []
    with progress_bar() as bar:
        task = bar.add_task("planning", total=None)
        for part in parts:
            sources, rejections = list_part(part, config.data)
            bar.update(task, total=len(plans) + len(refused) + len(sources), completed=len(plans) + len(refused))
            refused += [(part, rejection) for rejection in rejections]
            ahead = threads_to_read(config.encode.read_ahead)
            for outcome in _outcomes(sources, part, ahead, lambda: bar.update(task, advance=1)):
                if isinstance(outcome, Rejection):
                    refused.append((part, outcome))
                else:
                    plans.append((part, outcome))
    return parts, plans, refused


def print_draws(parts: Sequence[Part], buckets: Sequence[Bucket], owners: Sequence[int]) -> None:
    """How often an epoch of training draws from each part. Raises UserError as `pools_of` does."""
    pools = pools_of(buckets, owners, parts)
    clips = Counter(owners)
    draws: Counter[int] = Counter()
    for pool in pools:
        draws[owners[pool.items[0]]] += pool.draws
    rows = []
    for part in parts:
        mine, of_it = draws[part.number], clips[part.number]
        times = f"{mine / of_it:.3g} times" if of_it else "none to draw"
        rows.append((part.clips, of_it, mine, f"{mine / draws.total():.1%}", times))
    print_table("an epoch", ("part", "clips", "samples", "share", "each clip"), rows)


def tell_added(parts: Sequence[Part], buckets: Sequence[Bucket], owners: Sequence[int]) -> None:
    """Name the buckets that images have made for themselves, where a part has none of one frame."""
    for part in parts:
        mine = Counter(bucket for bucket, owner in zip(buckets, owners, strict=True) if owner == part.number)
        for bucket in sorted(mine.keys() - set(part.shapes.buckets)):
            text = f"{part.clips}: images that become {bucket}, a bucket that is not configured: {mine[bucket]}"
            console.print(f"{text}; name it among the buckets if it is wanted, or take them out", style="yellow", markup=False)


def _outcomes(sources: Sequence[ClipSource], part: Part, ahead: int, tick: Callable[[], None]) -> list[ClipPlan | Rejection]:
    files = KnownFiles()
    outcomes: list[ClipPlan | Rejection] = []
    with closing(begun_ahead(lambda source: plan_clip(source, files(source.path).info, part.shapes), sources, ahead)) as ready:
        for source, wait in zip(sources, ready, strict=True):
            try:
                outcomes.append(wait())
            except ClipError as error:
                outcomes.append(Rejection.of(source, error))
            tick()
    return outcomes


def _lines(plans: Sequence[Planned], refused: Sequence[Refused]) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = [
        {
            "clip": plan.source.name,
            "part": str(part.clips),
            "status": plan.status,
            "bucket": str(plan.bucket),
            "frames": plan.bucket.frames,
            "source_frames": plan.source_frames,
            "seconds": round(plan.seconds, 3),
            "unused_seconds": round(plan.unused_seconds, 3),
            "crop": plan.source.crop,
            "why": plan.why,
        }
        for part, plan in plans
    ]
    left = [{"clip": item.name, "part": str(part.clips), "status": "rejected", "why": item.reason} for part, item in refused]
    return taken + left


def _print_clips(plans: Sequence[ClipPlan], path: Path) -> None:
    """Every clip, or those that lose most where they are too many to read."""
    shown = plans if len(plans) <= _MOST_ROWS else sorted(plans, key=lambda plan: -plan.unused_seconds)[:_MOST_ROWS]
    title = "by clip" if shown is plans else f"by clip: the {_MOST_ROWS} of {len(plans):,} that drop most; all are in {path}"
    rows = [(plan.source.name, plan.bucket, plan.source_frames, f"{plan.unused_seconds:.3f}", plan.why) for plan in shown]
    if rows:
        print_table(title, ("clip", "bucket", "frames used", "seconds dropped", "what becomes of it"), rows)


def _print_shapes(plans: Sequence[ClipPlan]) -> None:
    by_shape: dict[Bucket, list[ClipPlan]] = defaultdict(list)
    for plan in plans:
        by_shape[plan.bucket].append(plan)
    rows = [(shape, *_sums(by_shape[shape]), f"{shape.tokens:,}") for shape in sorted(by_shape)]
    head = ("bucket", "clips", "trimmed", "seconds used", "seconds dropped", "tokens per clip")
    print_table("by bucket", head, [*rows, ("all", *_sums(plans), "")])


def _print_parts(parts: Sequence[Part], plans: Sequence[Planned], refused: Sequence[Refused]) -> None:
    rows = []
    for part in parts:
        mine = [plan for owner, plan in plans if owner is part]
        rows.append((part.clips, *_sums(mine), sum(owner is part for owner, _ in refused)))
    print_table("by source", ("source", "clips", "trimmed", "seconds used", "seconds dropped", "left out"), rows)


def _sums(plans: Sequence[ClipPlan]) -> tuple[int, int, str, str]:
    dropped = sum(plan.unused_seconds for plan in plans)
    used = sum(plan.seconds for plan in plans) - dropped
    return len(plans), sum(plan.status == "trimmed" for plan in plans), f"{used:.1f}", f"{dropped:.1f}"

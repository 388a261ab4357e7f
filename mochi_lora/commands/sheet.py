"""`mochi-lora sheet`: the data set as one page to look at, before any GPU time. Loads no model but T5's tokenizer."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mochi_lora.commands.encode_plan import Planned, Refused, plan_everything
from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table, progress_bar
from mochi_lora.data.ahead import begun_ahead, threads_to_read
from mochi_lora.data.known_files import KnownFiles
from mochi_lora.data.mix import Part, pools_of, where_of
from mochi_lora.errors import ClipError, UserError
from mochi_lora.model.base import locate
from mochi_lora.model.text import Tokenizer, load_tokenizer, tokenise
from mochi_lora.report.dataset_page import PartTold, Sheet, headline, write_sheet
from mochi_lora.report.dataset_problems import standing_out
from mochi_lora.report.dataset_rows import (
    UNREADABLE,
    ClipRow,
    Counted,
    LeftOut,
    Limits,
    Note,
    key_of,
    left_out_before,
    marked,
    read_notes,
    uncaptioned,
)
from mochi_lora.report.dataset_strips import strip, strip_of_source

Item = TypeVar("Item")
NAME = "dataset.html"
MOST_STRIPS = 240  # clips whose frames go into the page, some 20 kB each: a browser opens 5 MB at once


def run(config: Config, *, output: Path | None = None, most_strips: int = MOST_STRIPS) -> None:
    """Write the page to `output`, by default `run.folder`/dataset.html. Raises UserError where there is nothing at all."""
    path = output or config.run.folder / NAME
    if path.is_dir() or path.suffix.lower() != ".html":
        raise UserError(f"--output {path}: name a file that ends in .html, such as {path / NAME}")
    parts, plans, refused = plan_everything(config)
    before = [lost for part in parts for lost in left_out_before(part.clips)]
    if not (plans or refused or before):
        raise UserError(f"{where_of(config.data)}: there is nothing to show")
    tokenizer, not_counted = _tokenizer(config)
    rows = marked(_rows(config, plans, tokenizer), Limits(config.encode.unknown_token_limit, config.filter.min_motion))
    ahead = threads_to_read(config.encode.read_ahead)
    left_out = _left_out(refused)
    lost = [*left_out, *before]
    for_lost = min(sum(one.source is not None for one in lost), max(most_strips - len(rows), most_strips // 2))
    rows = _with_strips(rows, most_strips - for_lost, ahead)
    lost = _lost_with_strips(lost, for_lost, ahead)
    sheet = Sheet(
        title=", ".join(str(part.clips) for part in parts),
        model=config.model.base,
        rows=rows,
        left_out=lost[: len(left_out)],
        left_out_before=lost[len(left_out) :],
        parts=_parts(parts, rows) if config.data.mix else (),
        validates=config.data.validation_fraction > 0,
        least_motion=config.filter.min_motion,
        not_counted=not_counted,
        most_strips=most_strips,
    )
    found = write_sheet(path, sheet)
    console.print(f"clips    {headline(rows)}; {len(refused) + len(before)} left out", markup=False)
    if found:
        print_table("look at these first", ("",), [(problem.text,) for problem in found])
    if not_counted:
        console.print(f"tokens   not counted: {not_counted}", markup=False)
    console.print(f"sheet    {path}", markup=False)


def _tokenizer(config: Config) -> tuple[Tokenizer | None, str]:
    """T5's tokenizer if this machine has it, or why it does not: a page to look at downloads nothing."""
    base, revision = config.model.base, config.model.revision
    try:
        folder = locate(base, revision, "tokenizer") if Path(base).is_dir() else _downloaded(base, revision)
        return load_tokenizer(folder), ""
    except UserError as error:
        return None, str(error)


def _downloaded(base: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a local folder needs no hub client
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(base, revision=revision, local_files_only=True)) / "tokenizer"
    except (LocalEntryNotFoundError, HFValidationError) as error:
        message = f"model.base {base} is not on this machine; `mochi-lora encode` or `caption` downloads its tokenizer"
        raise UserError(message) from error


def _rows(config: Config, plans: Sequence[Planned], tokenizer: Tokenizer | None) -> list[ClipRow]:
    words = config.evaluation.trigger if config.caption.trigger is None else config.caption.trigger
    texts = sorted({plan.source.caption for _, plan in plans})
    told = tokenise(tokenizer, texts) if tokenizer else []
    counted = {
        text: Counted(len(item.ids), item.truncated, item.unknown_share) for text, item in zip(texts, told, strict=bool(told))
    }
    notes = {part.number: read_notes(part.clips) for part in {part.number: part for part, _ in plans}.values()}
    return [
        ClipRow(
            plan=plan,
            part=part.number,
            trigger=part.trigger or words.strip(),
            counted=counted.get(plan.source.caption),
            note=notes[part.number].get(key_of(plan.source), Note()),
        )
        for part, plan in plans
    ]


def _with_strips(rows: Sequence[ClipRow], most: int, ahead: int) -> list[ClipRow]:
    """`rows` with frames for at most `most`: those that stand out, then some of all others, evenly spread over the list."""
    first = [place for place, row in enumerate(rows) if standing_out(row)][:most]
    others = sorted(set(range(len(rows))) - set(first))
    room = min(most - len(first), len(others))
    chosen = sorted([*first, *(others[turn * len(others) // room] for turn in range(room))])
    shown = list(rows)
    for place, found in zip(chosen, _each(_strip_of_row, [rows[at] for at in chosen], ahead), strict=True):
        row = rows[place]
        if isinstance(found, ClipError):
            shown[place] = replace(row, unreadable=str(found), marks=(UNREADABLE, *row.marks))
        else:
            shown[place] = replace(row, strip=found)
    return shown


def _strip_of_row(row: ClipRow, files: KnownFiles) -> str:
    return strip(row.plan, files(row.plan.source.path).info)


def _lost_with_strips(lost: Sequence[LeftOut], most: int, ahead: int) -> list[LeftOut]:
    """`lost` with frames for the first `most` that can be looked at."""
    chosen = [place for place, one in enumerate(lost) if one.source is not None][:most]
    shown = list(lost)
    for place, found in zip(chosen, _each(_strip_of_lost, [lost[at] for at in chosen], ahead), strict=True):
        if isinstance(found, ClipError):
            shown[place] = replace(lost[place], unreadable=str(found))
        else:
            shown[place] = replace(lost[place], strip=found)
    return shown


def _strip_of_lost(lost: LeftOut, files: KnownFiles) -> str:
    assert lost.source is not None
    return strip_of_source(lost.source, files(lost.source.path).info)


def _each(make: Callable[[Item, KnownFiles], str], items: Sequence[Item], ahead: int) -> list[str | ClipError]:
    """What `make` makes of each, or why it cannot, read ahead by so many threads."""
    files, found = KnownFiles(), list[str | ClipError]()
    with progress_bar() as bar, closing(begun_ahead(lambda item: make(item, files), items, ahead)) as ready:
        task = bar.add_task("frames", total=len(items))
        for _, wait in zip(items, ready, strict=True):
            try:
                found.append(wait())
            except ClipError as error:
                found.append(error)
            bar.update(task, advance=1)
    return found


def _left_out(refused: Sequence[Refused]) -> list[LeftOut]:
    """What encode would not take; clips that only lack a caption can be looked at, to write one."""
    to_caption = {part.clips: uncaptioned(part.clips) for part in {part.number: part for part, _ in refused}.values()}
    return [LeftOut(lost.name, lost.reason, to_caption[part.clips].get(lost.name)) for part, lost in refused]


def _parts(parts: Sequence[Part], rows: Sequence[ClipRow]) -> list[PartTold]:
    owners = [row.part for row in rows]
    samples: Counter[int] = Counter()
    for pool in pools_of([row.plan.bucket for row in rows], owners, parts) if rows else ():
        samples[owners[pool.items[0]]] += pool.draws
    counts = Counter(owners)
    return [PartTold(str(part.clips), counts[part.number], samples[part.number]) for part in parts]

"""What an evaluation leaves behind: report, tables, pictures, rows, and the same in the run's trackers."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.evaluation.grid import ADAPTER, Cell
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.results import Evaluation, Row, file_name
from mochi_lora.files import digest_of, write_text
from mochi_lora.inference.tiles import GridRow, write_grids
from mochi_lora.model.adapter_file import read_provenance
from mochi_lora.report.before_after import write_before_after
from mochi_lora.report.markdown import write_markdown
from mochi_lora.report.page import write_page
from mochi_lora.report.results_file import write_results
from mochi_lora.training.tracking import HISTORY, open_trackers

ROWS, SHEET = "clips.jsonl", "before_after.png"
_GRID_ROWS = 6


def write_everything(config: Config, folder: Path, evaluation: Evaluation, rows: Sequence[Row]) -> Path:
    """Write all of it into `folder`, print the verdict and the paths, log it; returns the page's path."""
    write_text(
        folder / file_name(ROWS, quick=evaluation.quick),
        "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows),
    )
    write_results(folder, evaluation)
    write_markdown(folder, evaluation)
    triggered = [pair for pair in evaluation.pairs if pair.prompt_set == "trigger"]
    sheet = folder / file_name(SHEET, quick=evaluation.quick)
    if triggered:
        write_before_after(sheet, folder, triggered)
    page = write_page(folder, evaluation)
    _log(config, folder, evaluation, page)
    console.print(f"\n{evaluation.verdict.headline}", markup=False, style="bold")
    for reason in evaluation.verdict.reasons:
        console.print(f"  {reason}", markup=False)
    for advice in evaluation.verdict.advice:
        console.print(f"  next: {advice}", markup=False)
    if triggered:
        console.print(f"sheet    {sheet}", markup=False)
    for name in evaluation.grids:
        console.print(f"strengths {folder / name}", markup=False)
    console.print(f"report   {page}", markup=False)
    return page


def write_sweep_grids(folder: Path, cells: Sequence[Cell], *, quick: bool) -> tuple[str, ...]:
    """The first trigger prompts at every strength side by side, the base as strength 0; paths relative to `folder`."""
    videos = {(cell.shot.prompt, cell.shot.seed, cell.strength): cell.shot.video for cell in cells if _is_column(cell)}
    strengths = sorted({strength for _, _, strength in videos})
    places = list(dict.fromkeys((prompt, seed) for prompt, seed, _ in videos))[:_GRID_ROWS]
    rows = [
        GridRow(f"{prompt} (seed {seed})", tuple(folder / videos[prompt, seed, strength] for strength in strengths))
        for prompt, seed in places
    ]
    columns = ["base" if not strength else f"strength {strength:g}" for strength in strengths]
    paths = write_grids(folder, columns, rows, file_name("grid", quick=quick))
    return tuple(path.name for path in paths)


def _is_column(cell: Cell) -> bool:
    # The adapter at strength 0 is the base: its proof is told in words, and needs no column of its own.
    return cell.prompt_set == "trigger" and (cell.label == BASE or (cell.label == ADAPTER and cell.strength != 0))


def _log(config: Config, folder: Path, evaluation: Evaluation, page: Path) -> None:
    """Into the trackers of the run this adapter is from; other people's adapters and clips made elsewhere belong to none."""
    adapter, run = Path(evaluation.adapter), config.run.folder
    ours = adapter.is_file() and adapter.resolve().is_relative_to(run.resolve())
    if not ours or not (run / HISTORY).is_file():
        return
    values = {f"evaluation/{one.prompt_set}/{one.measure}": one.difference.value for one in evaluation.comparisons}
    step = read_provenance(adapter).get("step", 0)
    with open_trackers(config.tracking, config.run.folder, config.model_dump(mode="json"), {}) as tracker:
        # The digest makes every new outcome a record of its own; the same outcome again is none.
        kind = f"evaluation {digest_of(asdict(evaluation))[:8]}"
        films = {f"strengths side by side, {name}": folder / name for name in evaluation.grids}
        tracker.log_report(step, page, values, kind, films)

"""What an evaluation leaves behind: report, tables, pictures, rows, and the same in the run's trackers."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.evaluation.results import Evaluation, Row
from mochi_lora.files import digest_of, write_text
from mochi_lora.model.adapter_file import read_provenance
from mochi_lora.report.before_after import write_before_after
from mochi_lora.report.markdown import write_markdown
from mochi_lora.report.page import write_page
from mochi_lora.report.results_file import write_results
from mochi_lora.training.tracking import HISTORY, open_trackers

ROWS, SHEET = "clips.jsonl", "before_after.png"


def write_everything(config: Config, folder: Path, evaluation: Evaluation, rows: Sequence[Row]) -> Path:
    """Write all of it into `folder`, print the verdict and the paths, log it; returns the page's path."""
    write_text(folder / ROWS, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
    write_results(folder, evaluation)
    write_markdown(folder, evaluation)
    triggered = [pair for pair in evaluation.pairs if pair.prompt_set == "trigger"]
    if triggered:
        write_before_after(folder / SHEET, folder, triggered)
    page = write_page(folder, evaluation)
    _log(config, folder, evaluation, page)
    console.print(f"\n{evaluation.verdict.headline}", markup=False, style="bold")
    for reason in evaluation.verdict.reasons:
        console.print(f"  {reason}", markup=False)
    for advice in evaluation.verdict.advice:
        console.print(f"  next: {advice}", markup=False)
    if triggered:
        console.print(f"sheet    {folder / SHEET}", markup=False)
    console.print(f"report   {page}", markup=False)
    return page


def _log(config: Config, folder: Path, evaluation: Evaluation, page: Path) -> None:
    """Into the trackers of the run this adapter is from; clips made elsewhere belong to none."""
    adapter = Path(evaluation.adapter)
    if not (config.run.folder / HISTORY).is_file() or not folder.is_relative_to(config.run.folder):
        return
    values = {f"evaluation/{one.prompt_set}/{one.measure}": one.difference.value for one in evaluation.comparisons}
    step = read_provenance(adapter).get("step", 0)
    with open_trackers(config.tracking, config.run.folder, config.model_dump(mode="json"), {}) as tracker:
        # The digest makes every new outcome a record of its own; the same outcome again is none.
        tracker.log_report(step, page, values, kind=f"evaluation {digest_of(asdict(evaluation))[:8]}")

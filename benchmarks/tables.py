"""Writes the tables in the documentation from the committed result files and constants; `--check` only compares.

    python benchmarks/tables.py [--check] [PAGE ...]

A table stands between `<!-- table: train_step -->` and `<!-- end table -->`. Of repeated cases the newest line counts.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import predict_scale

from mochi_lora.commands.workloads import Base, training_work
from mochi_lora.config.schema import Config
from mochi_lora.engine.cards import Card, cards
from mochi_lora.engine.choice import Forecast, choose, room_of
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.workload import ModelSize
from mochi_lora.errors import UserError
from mochi_lora.spec import FRAMES_PER_SECOND, Bucket

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "docs" / "performance.md")
_LENGTHS = (37, 85, 163)
_RUN = 2000  # steps of a usual style adapter
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def main() -> int:
    """Returns 1 if `--check` finds a page that is not what the results say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is out of date")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, metavar="PAGE", help="default: every page with a table")
    arguments = parser.parse_args()
    check = arguments.check
    stale = [page for page in arguments.pages if page.read_text(encoding="utf-8") != filled(page.read_text(encoding="utf-8"))]
    for page in stale:
        if check:
            print(f"{page}: out of date; run python benchmarks/tables.py")
        else:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
            print(f"{page}: written")
    return int(check and bool(stale))


def filled(text: str) -> str:
    """The page with every table made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", text)


def table(name: str) -> str:
    """Markdown of one table: measured steps, errors of the choices, what is predicted for cards of many sizes, and for many."""
    measured = {"train_step": _steps, "sample_step": _samples, "plan_errors": _errors}
    return (measured | {"predicted": _predicted, "cards": _cards, "predicted_scale": _predicted_scale})[name]()


def _lines(benchmark: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / f"{benchmark}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def _steps() -> str:
    newest = {_case(line): line for line in _lines("train_step") if not line.get("error")}
    ordered = [line for _, line in sorted(newest.items(), key=lambda item: (item[0][0], str(item[0])))]
    head = ("Trainer", "GPU", "Cap", "Clip", "Plan", "s / step", "predicted", "GiB allocated", "predicted", "reserved")
    return _markdown(head, map(_step_row, ordered))


def _case(line: dict[str, Any]) -> tuple[Any, ...]:
    plan = str(Plan(**line["plan"]))
    return (line["frames"], line["height"], line["width"], line["gpu"], line["trainer"], plan, line["memory_cap_gib"])


def _step_row(line: dict[str, Any]) -> list[str]:
    seconds, predicted = line["step_seconds"], line.get("predicted") or {}
    return [
        line["trainer"],
        line["gpu"],
        f"{line['memory_cap_gib']:.0f} GiB" if line["memory_cap_gib"] else "none",
        f"{line['frames']} at {line['height']}x{line['width']}",
        "its own, bf16" if line["trainer"] == "diffusers" else str(Plan(**line["plan"])),
        f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f}, {line['steps']} steps)",
        f"{predicted['step_seconds']:.2f}" if predicted else "",
        f"{line['allocated_gib']:.1f}",
        f"{predicted['allocated_gib']:.1f}" if predicted else "",
        f"{line['peak_gib']:.1f}",
    ]


def _samples() -> str:
    """Of single steps; whole videos have lines of another form."""
    lines = [line | {"trainer": line["sampler"]} for line in _lines("sample_step") if "tokens_per_second" in line]
    newest = {(*_case(line), line["adapter"]): line for line in lines}
    ordered = [line for _, line in sorted(newest.items(), key=lambda item: (item[0][0], str(item[0])))]
    head = ("Sampler", "GPU", "Cap", "Clip", "Plan", "s / step", "predicted", "GiB allocated", "predicted", "reserved")
    rows = [[*_step_row(line), line["adapter"]] for line in ordered]
    return _markdown((*head, "Adapter"), rows) if rows else "Not measured yet.\n"


def _errors() -> str:
    whole = [line for line in _lines("plan_errors") if not line.get("error")]
    newest = {(line["gpu"], line["gate"], str(Plan(**line["plan"]))): line for line in whole}
    head = ("GPU", "Gates", "Plan", "Velocity", "Adapter gradient", "Worst tensor's gradient")
    figures = ("velocity_error", "gradient_error", "worst_gradient_error")
    rows = [[gpu, f"{gate}", plan, *(f"{line[name]:.1e}" for name in figures)] for (gpu, gate, plan), line in newest.items()]
    return _markdown(head, rows) if rows else "Not measured yet.\n"


def _predicted() -> str:
    """Of the committed constants: the fastest plan on each card, at three lengths."""
    rows = []
    for card, picks in _picks():
        for frames, pick in picks.items():
            what = ["none fits", "", "", ""]
            if pick is not None:
                room = pick.footprint
                what = [str(pick.plan), f"{room.device:.1f}", f"{room.host:.0f}", _range(card, pick.seconds)]
            rows.append([card.name, str(frames), *what])
    return _markdown(("GPU", "Frames", "Plan", "GiB", "GiB on the host", "s / step"), rows)


def _cards() -> str:
    """The same for people who look for their card: a row each, and how long a run takes."""
    rows = []
    for card, picks in _picks():
        paces = ["does not fit" if pick is None else f"{_range(card, pick.seconds)} s" for pick in picks.values()]
        short = picks[_LENGTHS[0]]
        hours = "" if short is None else f"{_range(card, short.seconds * _RUN / 3600)} h"
        rows.append([card.name, f"{card.memory_gib:.0f} GiB", *paces, hours])
    lengths = [f"{frames} frames ({frames / FRAMES_PER_SECOND:.1f} s)" for frames in _LENGTHS]
    return _markdown(("GPU", "Memory", *lengths, f"{_RUN:,} steps at {_LENGTHS[0]} frames"), rows)


@cache
def _picks() -> list[tuple[Card, dict[int, Forecast | None]]]:
    """Card, and by length the plan picked for it; half a second each, and several tables ask."""
    return [(card, {frames: _pick(card, frames) for frames in _LENGTHS}) for card in cards()]


def _pick(card: Card, frames: int) -> Forecast | None:
    """The fastest plan for 480x848 clips, None where none fits."""
    config = Config()
    work = training_work(config, Base(ModelSize.of({}), None), [Bucket(frames, 480, 848)])
    try:
        return choose(config.engine, work, card, room_of(card.memory_gib, 64.0), card.fastest_attention()).pick
    except UserError:
        return None


def _range(card: Card, value: float) -> str:
    """What is known of a card that was measured on another: a factor from and to."""
    low, high = (factor * value for factor in card.spread)
    return f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"


def _predicted_scale() -> str:
    """A paragraph on 8 and 16 GPUs, and the figures below it."""
    return f"{predict_scale.paragraph()}\n{_markdown(predict_scale.HEAD, predict_scale.table_rows())}"


if __name__ == "__main__":
    sys.exit(main())

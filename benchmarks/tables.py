"""Writes the tables in the documentation from the committed result files and constants; `--check` only compares.

    python benchmarks/tables.py [--check] [PAGE ...]

A table stands between `<!-- table: train_step -->` and `<!-- end table -->`. Those of measurements are `result_tables.py`'s.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import predict_scale
import result_tables
from result_tables import markdown

from mochi_lora.config.schema import Config
from mochi_lora.engine.kernels import Attention
from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError
from mochi_lora.planning.cards import Card, cards
from mochi_lora.planning.choice import Forecast, choose, room_of
from mochi_lora.planning.workload import ModelSize
from mochi_lora.runs.workloads import Base, training_work
from mochi_lora.spec import FRAMES_PER_SECOND, Bucket

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "docs" / "performance.md")
_LENGTHS = (37, 85, 163)
_RUN = 2000  # steps of a usual style adapter
_SIZE = (480, 848)
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
    """Markdown of one table: what was measured, what is predicted for cards of many sizes, and for many of them."""
    predicted = {
        "predicted": _predicted,
        "cards": lambda: _cards(_ENGLISH),
        "cards_zh": lambda: _cards(_CHINESE),
        "predicted_scale": _predicted_scale,
    }
    return predicted[name]() if name in predicted else result_tables.table(name)


def _predicted() -> str:
    """Of the committed constants: the fastest plan on each card, at three lengths."""
    rows = []
    for label, card, picks in _picks():
        for frames, pick in picks.items():
            what = ["none fits", "", "", ""]
            if pick is not None:
                room = pick.footprint
                what = [str(pick.plan), f"{room.device:.1f}", f"{room.host:.0f}", _range(card, pick, pick.seconds)]
            rows.append([label, str(frames), *what])
    return markdown(("GPU", "Frames", "Plan", "GiB", "GiB on the host", "s / step"), rows)


@dataclass(frozen=True)
class _Words:
    """What the table of cards says, in a language."""

    head: tuple[str, str, str, str]  # the third of each length, with frames and seconds; the last with steps and frames
    fits_not: str
    to: str
    measured: str
    uncompiled: str


_ENGLISH = _Words(
    ("GPU", "Memory", "{frames} frames ({seconds:.1f} s)", "{steps:,} steps at {frames} frames"),
    "does not fit", " to ", "measured", "not compiled",
)  # fmt: skip
_CHINESE = _Words(
    ("GPU", "显存", "{frames} 帧（{seconds:.1f} 秒）", "{frames} 帧训练 {steps:,} 步"),
    "放不下", " 到 ", "实测", "未编译",
)  # fmt: skip


def _cards(words: _Words) -> str:
    """The same for people who look for their card: a row each, a row more where it was measured, and how long a run takes."""
    rows = []
    for label, card, picks in _picks():
        cells = [words.fits_not if pick is None else _cell(card, pick, words) for pick in picks.values()]
        short = picks[_LENGTHS[0]]
        hours = "" if short is None else f"{_range(card, short, short.seconds * _RUN / 3600, words.to)} h"
        rows.append([label, f"{card.memory_gib:.0f} GiB", *cells, hours])
        if label == card.name and (found := _measured(card)):
            cells = [_measured_cell(found[frames], words) if frames in found else "" for frames in _LENGTHS]
            hours = f"{found[_LENGTHS[0]]['step_seconds']['median'] * _RUN / 3600:.1f} h" if _LENGTHS[0] in found else ""
            rows.append([f"{label}, **{words.measured}**", f"{card.memory_gib:.0f} GiB", *cells, hours])
    lengths = [words.head[2].format(frames=frames, seconds=frames / FRAMES_PER_SECOND) for frames in _LENGTHS]
    return markdown((*words.head[:2], *lengths, words.head[3].format(steps=_RUN, frames=_LENGTHS[0])), rows)


def _cell(card: Card, pick: Forecast, words: _Words) -> str:
    room = pick.footprint
    return f"{_range(card, pick, pick.seconds, words.to)} s, {room.device:.0f} + {room.host:.0f} GiB"


def _measured(card: Card) -> dict[int, dict[str, Any]]:
    """Our fastest committed step of each length on this card, without a cap; what it took of the host is not in the lines."""
    found: dict[int, dict[str, Any]] = {}
    for line in result_tables.newest_steps():
        ours = line["trainer"] == "mochi-lora" and not line["memory_cap_gib"] and (line["height"], line["width"]) == _SIZE
        if ours and card.name in line["gpu"]:
            known = found.setdefault(line["frames"], line)
            found[line["frames"]] = min(known, line, key=lambda one: one["step_seconds"]["median"])
    return found


def _measured_cell(line: dict[str, Any], words: _Words) -> str:
    plan = Plan(**line["plan"])
    how = [
        plan.precision,
        *([plan.attention] if plan.attention != "auto" else []),
        *([] if plan.compile else [words.uncompiled]),
    ]
    return f"{line['step_seconds']['median']:.2f} s, {line['allocated_gib']:.0f} GiB ({', '.join(how)})"


@cache
def _picks() -> list[tuple[str, Card, dict[int, Forecast | None]]]:
    """Name, card, and by length the plan picked for it, with what needs nothing installed and with flash4 where its rates are
    known; half a second each, and several tables ask.
    """
    kernels: list[tuple[str, Card, Attention]] = []
    for card in cards():
        kernels.append((card.name, card, card.fastest_attention("bf16")))
        if "flash4" in card.attention:
            kernels.append((f"{card.name}, flash4", card, "flash4"))
    return [(name, card, {frames: _pick(card, kernel, frames) for frames in _LENGTHS}) for name, card, kernel in kernels]


def _pick(card: Card, kernel: Attention, frames: int) -> Forecast | None:
    """The fastest plan for 480x848 clips, None where none fits."""
    config = Config()
    work = training_work(config, Base(ModelSize.of({}), None), [Bucket(frames, *_SIZE)])
    try:
        return choose(config.engine, work, card, room_of(card.memory_gib, 64.0), kernel).pick
    except UserError:
        return None


def _range(card: Card, pick: Forecast, value: float, to: str = " to ") -> str:
    """What is known of a plan that was measured on another card: a factor from and to."""
    low, high = (factor * value for factor in card.spread(pick.plan))
    return f"{low:.1f}" if low == high else f"{low:.1f}{to}{high:.1f}"


def _predicted_scale() -> str:
    """A paragraph on 8 and 16 GPUs, and the figures below it."""
    return f"{predict_scale.paragraph()}\n{markdown(predict_scale.HEAD, predict_scale.table_rows())}"


if __name__ == "__main__":
    sys.exit(main())

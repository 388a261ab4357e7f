"""Writes the tables in the documentation from the committed result files; `--check` only compares.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: train_step -->` and `<!-- end table -->`. Of repeated cases the newest line counts.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md",)
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def main() -> int:
    """Returns 1 if `--check` finds a page that is not what the results say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is out of date")
    check = parser.parse_args().check
    stale = [page for page in PAGES if page.read_text(encoding="utf-8") != filled(page.read_text(encoding="utf-8"))]
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


def table(benchmark: str) -> str:
    """Markdown table of one result file."""
    lines = (ROOT / "benchmarks" / "results" / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in map(json.loads, lines):
        newest[_case(line)] = line
    head = "| Trainer | GPU | Frames | Base | Attention | Checkpointing | s / step | Allocated GiB | Reserved GiB |\n"
    rows = (_row(line) for _, line in sorted(newest.items(), key=lambda item: (item[0][0], str(item[0]))))
    return head + "|---|---|---|---|---|---|---|---|---|\n" + "".join(rows)


def _case(line: dict[str, Any]) -> tuple[Any, ...]:
    plan = json.dumps(line["plan"], sort_keys=True)
    return (line["frames"], line["height"], line["width"], line["gpu"], line["trainer"], plan, line["memory_cap_gib"])


def _row(line: dict[str, Any]) -> str:
    seconds, plan = line["step_seconds"], line["plan"]
    timing = f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f}, {line['steps']} steps)"
    cells = (
        line["trainer"],
        line["gpu"],
        f"{line['frames']} at {line['height']}x{line['width']}",
        plan["precision"],
        "its own" if line["trainer"] == "diffusers" else plan["attention"],
        plan["checkpointing"],
        timing,
        f"{line['allocated_gib']:.1f}",
        f"{line['peak_gib']:.1f}",
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main())

"""Fits the predictions' constants (mochi_lora/planning/fitted.yaml) on half of the measured cells; errors on the others.

    python benchmarks/fit_plan.py [--write]

Cells are the newest lines of each case in results/train_step.jsonl and results/prototype.jsonl at full depth, sorted by what
they keep, so that each constant is seen from both halves; every second one is fitted. Few cells and many constants: each
constant is held near its present value, in proportion.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mochi_lora.engine.plan import Plan
from mochi_lora.planning.cards import Card, cards
from mochi_lora.planning.footprint import GIB, Constants, fitted, predict_memory, weight_bytes
from mochi_lora.planning.pace import seconds_per_step
from mochi_lora.planning.workload import AdapterSize, ModelSize, Workload
from mochi_lora.spec import Bucket

ROOT = Path(__file__).parent.parent
FITTED = ROOT / "mochi_lora" / "planning" / "fitted.yaml"
FILES = ("train_step.jsonl", "prototype.jsonl")
MEMORY = ("base_gib", "kept_compiled", "kept_eager", "gradients_compiled", "gradients_eager")
TIME = ("moved_compiled", "again_compiled", "moved_eager", "again_eager", "quantising", "fixed_seconds")
_ADAPTER_PER_RANK = 2_055_168  # parameters of joint attention at rank 1
_HELD = 0.1  # weight of staying where it is against one cell's relative error
_ROUNDS = 30


@dataclass(frozen=True)
class Cell:
    """One measured case."""

    name: str
    plan: Plan
    work: Workload
    card: Card
    seconds: float
    gib: float
    other_weights: float  # GiB that its base took more than this version's would


def cells(paths: Sequence[Path]) -> list[Cell]:
    """The newest line of each case on a measured card; stock diffusers is another program."""
    newest: dict[str, Cell] = {}
    for path in paths:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            card = next((card for card in cards() if card.source and card.name in line["gpu"]), None)
            if card is None or line["trainer"] == "diffusers" or line.get("error") or line["layers"] != ModelSize.of({}).layers:
                continue
            cell = _cell(line, card)
            newest[cell.name] = cell
    return sorted(newest.values(), key=lambda cell: (cell.plan.compile, cell.plan.checkpointing, cell.name))


def predicted(cell: Cell, constants: Constants) -> tuple[float, float]:
    """(GiB allocated in a step, seconds)."""
    memory = dict(predict_memory(cell.plan, cell.work, constants).moments)["training"]
    return memory + cell.other_weights, seconds_per_step(cell.plan, cell.work, cell.card, constants)


def fit(found: Sequence[Cell], constants: Constants) -> Constants:
    """Least squares of log(predicted / measured), memory and time apart, by Gauss-Newton in the logarithms of the constants."""

    def memory(known: Constants) -> np.ndarray:
        return np.log([predicted(cell, known)[0] / cell.gib for cell in found])

    def pace(known: Constants) -> np.ndarray:
        return np.log([predicted(cell, known)[1] / cell.seconds for cell in found])

    return _fitted(_fitted(constants, MEMORY, memory), TIME, pace)


def errors(found: Sequence[Cell], constants: Constants) -> list[tuple[str, float, float]]:
    """(cell, relative error of the memory, of the time)."""
    told = [(cell, *predicted(cell, constants)) for cell in found]
    return [(cell.name, gib / cell.gib - 1, seconds / cell.seconds - 1) for cell, gib, seconds in told]


def _fitted(start: Constants, names: Sequence[str], residuals: Callable[[Constants], np.ndarray]) -> Constants:
    values = np.log([getattr(start, name) for name in names])
    home = values.copy()

    def at(logs: np.ndarray) -> Constants:
        return replace(start, **dict(zip(names, map(float, np.exp(logs)), strict=True)))

    for _ in range(_ROUNDS):
        here = residuals(at(values))
        slopes = np.stack([(residuals(at(values + step)) - here) / 1e-4 for step in np.eye(len(names)) * 1e-4], axis=1)
        system = np.vstack([slopes, _HELD * np.eye(len(names))])
        values = values - np.linalg.lstsq(system, np.concatenate([here, _HELD * (values - home)]), rcond=None)[0]
    return at(values)


def _cell(line: dict[str, Any], card: Card) -> Cell:
    plan = Plan(**line["plan"])
    plan = replace(plan, attention="cudnn") if plan.attention == "auto" else plan  # torch's own choice there
    size = ModelSize.of({})
    adapter = AdapterSize(line["rank"] * _ADAPTER_PER_RANK, 8, averaged=False)
    work = Workload(size, Bucket(line["frames"], line["height"], line["width"]), 1, 1, adapter, None)
    own = line.get("weights_gib")
    return Cell(
        name=f"{line['trainer']} {work.bucket} {plan} cap {line['memory_cap_gib']}",
        plan=plan,
        work=work,
        card=card,
        seconds=line["step_seconds"]["median"],
        gib=line["allocated_gib"],
        other_weights=own - weight_bytes(size, plan.precision) / GIB if own else 0.0,
    )


def _write(path: Path, constants: Constants) -> None:
    text = path.read_text(encoding="utf-8")
    for name, value in asdict(constants).items():
        text = re.sub(rf"^{name}: .*$", f"{name}: {value:.4g}", text, flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Fit, and print both halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the constants into fitted.yaml")
    write = parser.parse_args().write
    found = cells([ROOT / "benchmarks" / "results" / name for name in FILES])
    constants = fit(found[::2], fitted())
    for title, part in (("fitted on", found[::2]), ("not fitted", found[1::2])):
        print(f"{title}: {'memory':>8} {'time':>8}")
        for name, memory, seconds in errors(part, constants):
            print(f"  {memory:+8.1%} {seconds:+8.1%}  {name}")
    for name, value in asdict(constants).items():
        print(f"{name}: {value:.4g} (was {getattr(fitted(), name):.4g})")
    if write:
        _write(FITTED, constants)


if __name__ == "__main__":
    main()

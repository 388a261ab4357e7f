"""`mochi-lora tiny FOLDER`: a tiny Mochi with random weights, to try the whole road on a CPU."""

from pathlib import Path

from mochi_lora.console import console
from mochi_lora.model.tiny import build_tiny


def run(folder: Path, *, seed: int) -> None:
    """Build the tiny model under `folder` (or find it there) and say what to do next. Raises UserError."""
    build_tiny(folder, seed=seed)
    console.print(f"tiny model (seed {seed}): {folder}", markup=False)
    console.print(f"give it as model.base: {folder}", markup=False)

"""`mochi-lora tiny FOLDER`: mochi-tiny, trained on a drawn world, or the same shape with random weights."""

import shlex
from pathlib import Path

from mochi_lora.console import console
from mochi_lora.tiny.pretrained import write_pretrained
from mochi_lora.tiny.world import FRAMES, HEIGHT, WIDTH

_PROMPT = "a big red circle moves right in front of a grey wall"


def run(folder: Path, *, random: int | None) -> None:
    """See that the model lies in `folder` (with `random`, weights of that seed) and say what to do next. Raises UserError."""
    if random is None:
        write_pretrained(folder)
        console.print(f"mochi-tiny, trained: {folder}", markup=False)
    else:
        from mochi_lora.model.tiny import build_tiny  # noqa: PLC0415 - diffusers: seconds that a copy of files does not need

        build_tiny(folder, seed=random)
        console.print(f"tiny model, random weights of seed {random}: {folder}", markup=False)
    size = f"--sample.frames {FRAMES} --sample.height {HEIGHT} --sample.width {WIDTH}"
    model = f"mochi-lora sample --config quickstart.yaml --model.base {shlex.quote(str(folder))}"
    console.print(f"next: {model} {size} --base-only --prompt {shlex.quote(_PROMPT)}", markup=False)

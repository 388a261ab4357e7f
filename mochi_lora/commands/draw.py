"""`mochi-lora draw FOLDER`: clips of the drawn world with captions, for training a LoRA of mochi-tiny."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from mochi_lora.console import console, progress_bar
from mochi_lora.spec import Bucket
from mochi_lora.tiny.dataset import DrawnSet, draw_set
from mochi_lora.tiny.scenery import Style
from mochi_lora.tiny.world import FRAMES, HEIGHT, HELD_OUT_MOTION, MOTIONS, MOVING, TRIGGER, WIDTH, Motion


def run(folder: Path, *, style: Style, motions: Sequence[Motion], count: int, seed: int) -> None:
    """See that `folder` holds the set and say how to use it; no `motions` are all that mochi-tiny knows and that move.

    Raises UserError.
    """
    chosen = tuple(motion for motion in MOTIONS if motion in motions) or MOVING
    wanted = DrawnSet(style, count, chosen, seed)
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=count)
        draw_set(folder, wanted, on_clip=lambda done: bar.update(task, completed=done))
        bar.update(task, completed=count)  # a finished folder is kept, clip by clip nothing happened
    bucket = Bucket(FRAMES, HEIGHT, WIDTH)
    for line in (f"{count} clips, {style} style, {bucket}, {' '.join(chosen)}: {folder}", _trigger(wanted)):
        console.print(line, markup=False)
    told = ("mochi-lora", "encode", "--config", "quickstart.yaml", "--data.mix", json.dumps([{"clips": str(folder)}]))
    console.print(f"next: {shlex.join(told)}", markup=False)


def _trigger(wanted: DrawnSet) -> str:
    """What calls, in a prompt, the thing these clips teach."""
    new = [f'"{TRIGGER}", before every caption'] if wanted.style == "chalk" else []
    new += ['"circles around", the motion mochi-tiny never saw'] if HELD_OUT_MOTION in wanted.motions else []
    return f"trigger: {'; '.join(new)}" if new else "trigger: none, mochi-tiny can draw all of this already"

"""The page's small pieces of HTML: where a job stands, and what is wrong with a field. All that people typed is escaped."""

import math
from html import escape

from mochi_lora.demo.session import NAMES, Event, Phase, Progress
from mochi_lora.demo.turns import Waiting


def told(event: Event | Waiting) -> str | None:
    """The status after `event`; None where the status stays as it is."""
    match event:
        case Waiting(ahead=ahead):
            return line(f"Waiting: {ahead} {'video' if ahead == 1 else 'videos'} of others before yours")
        case Phase(text=text):
            return line(f"{text} ...")
        case Progress(side=side, done=done, steps=steps, seconds_left=seconds):
            rest = f", {left(seconds)}" if seconds is not None else ""
            return line(f"{NAMES[side].capitalize()}: step {done} of {steps}{rest}", fraction=done / steps)
    return None


def left(seconds: float) -> str:
    """`about 40 s left`, rounded as an estimate should be."""
    if seconds < 90:
        return f"about {max(1, math.ceil(seconds))} s left"
    minutes = math.ceil(seconds / 60)
    return f"about {minutes} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"


def line(text: str, *, fraction: float | None = None, kind: str = "") -> str:
    """The status line, with a bar where there is a `fraction` (0 to 1) to show; `kind` is a CSS class."""
    bar = ""
    if fraction is not None:
        percent = round(100 * fraction)
        bar = (
            f'<div class="bar" role="progressbar" aria-label="Steps" aria-valuenow="{percent}" aria-valuemin="0" '
            f'aria-valuemax="100"><div style="width: {percent}%"></div></div>'
        )
    return f'<div class="status {kind}" role="status"><p>{escape(text)}</p>{bar}</div>'


def problem(field: str, text: str) -> str:
    """What is wrong, under its field: several may share a row, so it is named where the text does not do that itself."""
    name = field.replace("_", " ")
    named = text if name in text.lower() else f"{name}: {text}"
    return f'<p class="problem" role="alert">{escape(named[0].upper() + named[1:])}</p>'

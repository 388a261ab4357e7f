"""Where the seconds of a source went: into clips, or into none and why. They add up to all there are."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mochi_lora.curation.ranges import ClipRange, Usable


@dataclass(frozen=True)
class Spent:
    """Seconds of footage by what became of them."""

    clips: float = 0.0  # a second that several clips show (split.mode slide) counts once
    fades: float = 0.0  # and dissolves and short black
    margins: float = 0.0  # split.margin at both ends of the shots that give clips
    short_shots: float = 0.0  # all of each shot that gives no clip
    rest_of_shots: float = 0.0  # what split.mode leaves of a shot that gives clips

    def __add__(self, other: "Spent") -> "Spent":
        """Of both."""
        return Spent(*(one + two for one, two in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def lost(self) -> dict[str, float]:
        """Seconds in no clip, by why; for footage.jsonl."""
        return {name: round(seconds, 3) for name, seconds in asdict(self).items() if name != "clips"}


def spent_of_shot(start: float, end: float, part: Usable, clips: Sequence[ClipRange]) -> Spent:
    """Of the shot [start, end), from whose `part` these clips, ascending, were taken."""
    if not clips:
        return Spent(short_shots=end - start)
    covered, until = 0.0, start
    for clip in clips:
        covered += max(0.0, min(clip.end, end) - max(clip.start, until))
        until = max(until, min(clip.end, end))
    margins = (part.times[0] - start) + max(0.0, end - max(part.end, until))
    return Spent(clips=covered, margins=margins, rest_of_shots=max(0.0, end - start - covered - margins))

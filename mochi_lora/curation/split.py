"""One surveyed source to its clips: shots, ranges, measures."""

from dataclasses import dataclass
from pathlib import Path

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.clip_measures import measure_clip
from mochi_lora.curation.manifest import Clip, name_in_table
from mochi_lora.curation.ranges import clip_ranges, usable_part
from mochi_lora.curation.shots import find_shots
from mochi_lora.curation.spent import Spent, spent_of_shot
from mochi_lora.curation.survey import Survey
from mochi_lora.data.sources import caption_beside
from mochi_lora.spec import FRAMES_PER_SECOND


@dataclass(frozen=True)
class Became:
    """What became of a source."""

    seconds: float
    shots: int
    short_shots: int  # that give no clip
    longest: float  # seconds of the longest shot, without its margins
    spent: Spent

    def why_no_clip(self, frames: int) -> str:
        """For a source without a clip of so many frames."""
        longest = f", the longest has {self.longest:.2f} s without split.margin" if self.shots else ""
        return (
            f"no clip of {frames} frames ({frames / FRAMES_PER_SECOND:.2f} s) in its {self.seconds:.1f} s: {self.shots} shots"
            f"{longest}; {self.spent.fades:.1f} s are fades; shorter clips: split.frames"
        )


def split_source(path: Path, survey: Survey, settings: SplitConfig, folder: Path) -> tuple[list[Clip], Became]:
    """Clips in order of time; `folder` is that of the table. Raises ClipError for an unreadable caption."""
    text = caption_beside(path) or ""  # of all its clips
    name = name_in_table(path, folder)
    times = survey.times.tolist()
    shots, _ = find_shots(survey, settings.black)
    clips: list[Clip] = []
    spent, short, longest, in_shots = Spent(), 0, 0.0, 0.0
    for number, shot in enumerate(shots):
        start, end = times[shot.first], times[shot.stop] if shot.stop < len(times) else survey.duration
        part = usable_part(times[shot.first : shot.stop], end, survey.frame_seconds, settings.margin)
        pieces = clip_ranges(part, settings)
        spent += spent_of_shot(start, end, part, pieces)
        short += not pieces
        longest = max(longest, part.end - part.times[0] if part.times else 0.0)
        in_shots += end - start
        for piece in pieces:
            measures = measure_clip(survey, shot, piece.start, piece.end, settings.black)
            clips.append(Clip(name, piece.start, piece.end, text, str(path), number, measures))
    spent += Spent(fades=survey.duration - in_shots)
    return clips, Became(survey.duration, len(shots), short, longest, spent)

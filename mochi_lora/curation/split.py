"""One surveyed source to its clips: shots, ranges, measures."""

from pathlib import Path

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.clip_measures import measure_clip
from mochi_lora.curation.manifest import Clip, name_in_table
from mochi_lora.curation.ranges import clip_ranges, usable_part
from mochi_lora.curation.shots import find_shots
from mochi_lora.curation.survey import Survey
from mochi_lora.data.sources import caption_beside


def split_source(path: Path, survey: Survey, settings: SplitConfig, folder: Path) -> tuple[list[Clip], int]:
    """(clips in order of time, number of shots). `folder` is that of the table. Raises ClipError for an unreadable caption."""
    text = caption_beside(path) or ""  # of all its clips
    name = name_in_table(path, folder)
    times = survey.times.tolist()
    shots, _ = find_shots(survey, settings.black)
    clips = []
    for number, shot in enumerate(shots):
        end = times[shot.stop] if shot.stop < len(times) else survey.duration
        part = usable_part(times[shot.first : shot.stop], end, survey.frame_seconds, settings.margin)
        for piece in clip_ranges(part, settings):
            measures = measure_clip(survey, shot, piece.start, piece.end, settings.black)
            clips.append(Clip(name, piece.start, piece.end, text, str(path), number, measures))
    return clips, len(shots)

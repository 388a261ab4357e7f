"""One surveyed source to its clips: shots, ranges, measures."""

from pathlib import Path

from mochi_lora.config.schema import SplitConfig
from mochi_lora.curation.clip_measures import measure_clip
from mochi_lora.curation.manifest import Clip, name_in_table
from mochi_lora.curation.ranges import clip_ranges, usable_part
from mochi_lora.curation.shots import find_shots
from mochi_lora.curation.survey import Survey
from mochi_lora.errors import ClipError


def split_source(path: Path, survey: Survey, settings: SplitConfig, folder: Path) -> tuple[list[Clip], int]:
    """(clips in order of time, number of shots). `folder` is that of the table. Raises ClipError for an unreadable caption."""
    text = _text_beside(path)
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


def _text_beside(path: Path) -> str:
    """The same-stem .txt beside the source: a caption for all its clips; empty where there is none."""
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        message = f"{path}: its caption {path.with_suffix('.txt')} is not UTF-8 (byte {error.start}): save it as UTF-8"
        raise ClipError(message) from error

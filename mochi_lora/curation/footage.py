"""Raw footage: which files there are, and the survey of each, made once and kept."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mochi_lora.config.curation import SplitConfig
from mochi_lora.curation.survey import Survey, load_survey, save_survey, survey_key, survey_source
from mochi_lora.data.media import VIDEO_SUFFIXES, shown_name
from mochi_lora.data.probe import ClipInfo, probe
from mochi_lora.errors import ClipError, UserError

_CAPTION_SUFFIX = ".txt"
_KNOWN = " ".join(sorted(VIDEO_SUFFIXES))


@dataclass(frozen=True)
class Progress:
    """Whom to tell: `found(frames)` when a source is going to be surveyed, `done(frames)` as it goes."""

    found: Callable[[int], None]
    done: Callable[[int], None]


@dataclass(frozen=True)
class Refused:
    """A source that cannot be used, and why with what to change."""

    reason: str


@dataclass(frozen=True)
class Surveyed:
    """A source's survey, and whether an earlier run had made it."""

    survey: Survey
    was_there: bool


def list_footage(footage: Path, folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Video files of `footage`, by path, and how many files of which suffix are none, most first; a file whose path is not
    UTF-8, which no table could hold, is among these by its name.

    Left out of both are hidden files, what lies in `folder` (our own), and captions (`.txt`).

    Raises UserError where there are none.
    """
    if not footage.exists():
        message = f"prepare.footage: {footage} does not exist; expected a video or a folder of videos"
        raise UserError(message)
    own = folder.resolve()
    inside = [footage] if footage.is_file() else [path for path in footage.rglob("*") if _visible(path, footage, own)]
    named = [path for path in inside if shown_name(path) is None]
    found = sorted(path for path in named if path.suffix.lower() in VIDEO_SUFFIXES)
    known = VIDEO_SUFFIXES | {_CAPTION_SUFFIX}
    others = Counter(path.suffix.lower() or "(no suffix)" for path in named if path.suffix.lower() not in known)
    others.update(f"({shown}: not UTF-8, rename it)" for path in inside if (shown := shown_name(path)))
    if not found:
        seen = f" ({' '.join(f'{count} {suffix}' for suffix, count in others.most_common())})" if others else ""
        message = f"prepare.footage: no video in {footage}{seen}; expected files named {_KNOWN}"
        raise UserError(message)
    return found, dict(others.most_common())


def _visible(path: Path, footage: Path, own: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(footage).parts)
    return not hidden and path.is_file() and not path.resolve().is_relative_to(own)


def survey_footage(
    paths: Sequence[Path], folder: Path, settings: SplitConfig, workers: int, progress: Progress
) -> list[Surveyed | Refused]:
    """The survey of each path, in their order; kept under `folder`/survey, so that a second run makes only what is missing.

    Threads suffice: decoding, scaling and all that OpenCV does let go of the interpreter. A thread dies with its process;
    a pool of processes would outlive a kill.
    """
    stop = threading.Event()

    def look_up(path: Path) -> Surveyed | ClipInfo | Refused:
        return _kept_or_probed(path, folder, settings)

    def survey(job: tuple[Path, Surveyed | ClipInfo | Refused]) -> Surveyed | Refused:
        path, found = job
        if not isinstance(found, ClipInfo):
            return found
        try:
            kept_as = _file(path, folder, settings)  # before: a file that grows meanwhile is another one
            made = survey_source(found, settings, progress.done, stop)
        except ClipError as error:
            return Refused(_without_name(str(error), path))
        except OSError as error:
            return Refused(f"cannot be read ({error.strerror})")
        save_survey(kept_as, made)
        return Surveyed(made, was_there=False)

    pool = ThreadPoolExecutor(workers)
    try:
        looked_up = list(pool.map(look_up, paths))
        progress.found(sum(len(found.times) for found in looked_up if isinstance(found, ClipInfo)))
        return list(pool.map(survey, zip(paths, looked_up, strict=True)))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _kept_or_probed(path: Path, folder: Path, settings: SplitConfig) -> Surveyed | ClipInfo | Refused:
    try:
        if path.stat().st_size and (kept := load_survey(_file(path, folder, settings))) is not None:
            return Surveyed(kept, was_there=True)
        return probe(path)
    except ClipError as error:
        return Refused(_without_name(str(error), path))
    except OSError as error:
        return Refused(f"cannot be read ({error.strerror})")


def _file(path: Path, folder: Path, settings: SplitConfig) -> Path:
    return folder / "survey" / f"{survey_key(path, settings)}.safetensors"


def _without_name(message: str, path: Path) -> str:
    return message.removeprefix(f"{path}: ")

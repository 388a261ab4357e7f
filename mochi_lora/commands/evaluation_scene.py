"""What an evaluation is about: which clips, where they lie, and what they are set against. What cannot work is told here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mochi_lora.config.requests import EvaluationRequest
from mochi_lora.config.schema import BackbonesConfig, Config
from mochi_lora.console import console, progress_bar
from mochi_lora.data.index import index_path, read_index
from mochi_lora.data.mix import list_part, parts_of
from mochi_lora.data.sources import Found, list_sources
from mochi_lora.data.trigger import calls
from mochi_lora.errors import UserError
from mochi_lora.evaluation.footage import Clip, clips_of
from mochi_lora.evaluation.grid import Cell, plan, quick_part, thin, training_cells
from mochi_lora.evaluation.paired import PrimaryAxis
from mochi_lora.evaluation.prompts import prompt_sets
from mochi_lora.evaluation.statistics import prompts_needed
from mochi_lora.evaluation.truth import require_drawn
from mochi_lora.evaluation.videos import from_videos
from mochi_lora.files import sha256_of_file
from mochi_lora.measures.aesthetic_head import load_aesthetic_head
from mochi_lora.measures.backbones import DRAWN_WORLD, unavailable
from mochi_lora.runs.folder import evaluation_folder, final_adapter, step_adapters

# Of the data set. Every reference goes through three networks. A training clip is decoded once, and then takes 0.04 s of
# looking for copies of it among 512, on one core.
_MOST_REFERENCES, _MOST_TRAINING = 128, 512


@dataclass(frozen=True)
class ClipSet:
    """The clips of a data set that are looked at, and what became of the others."""

    clips: tuple[Clip, ...]
    usable: int  # of which `clips` are as many as time allows, evenly spaced
    unreadable: int = 0
    held_out: int = 0

    @property
    def told(self) -> str:
        """For people: how many, and how many not."""
        count = str(self.usable) if len(self.clips) == self.usable else f"{len(self.clips)} of {self.usable}, evenly spaced"
        others = ((self.unreadable, "could not be read"), (self.held_out, "held out of training are left out"))
        return ", ".join([count, *(f"{number} {why}" for number, why in others if number)])


@dataclass(frozen=True)
class Scene:
    """One evaluation before anything is made or measured."""

    folder: Path  # of the report; the cells' videos are relative to it, because the report links to them
    cells: tuple[Cell, ...]
    on_captions: tuple[Cell, ...]  # for memorisation only
    adapter: Path | None  # None: clips made elsewhere
    checkpoints: tuple[tuple[int, Path], ...]
    training: ClipSet
    references: ClipSet

    @property
    def everything(self) -> tuple[Cell, ...]:
        """All cells."""
        return (*self.cells, *self.on_captions)

    @property
    def prompts(self) -> int:
        """How many different ones."""
        return len({cell.shot.prompt for cell in self.everything})


def set_scene(config: Config, request: EvaluationRequest) -> Scene:
    """Raises UserError for everything that can be known to be wrong before hours of sampling."""
    settings = config.evaluation
    if request.from_videos:
        if request.output:
            raise UserError("--output: with --from-videos the report lies beside the clips, which it links to; leave it out")
        cells = from_videos(request.from_videos, settings.trigger)
        if not any(cell.prompt_set == "trigger" for cell in cells):
            message = f"{request.from_videos}: the trigger {settings.trigger!r} is in none of the prompts, so nothing calls the"
            raise UserError(f"{message} adapter; mend evaluation.trigger, or leave it empty where there is no trigger word")
        cells = quick_part(cells) if request.quick else cells
        _refuse_other_worlds(config, cells, made=False)
        _tell_of_few_prompts(cells, quick=request.quick)
        return Scene(request.from_videos, cells, (), None, (), *_footage(config))
    sets = prompt_sets(settings)
    adapter = request.adapter or final_adapter(config)
    if not adapter.is_file():
        message = f"{adapter}: there is no such adapter; train first, or give --adapter PATH"
        raise UserError(message)
    of_run = () if request.quick or request.adapter else thin(step_adapters(config), settings.curve_checkpoints)
    cells = plan(sets, adapter, settings, checkpoints=of_run, quick=request.quick)
    _refuse_other_worlds(config, cells, made=True)
    _tell_of_few_prompts(cells, quick=request.quick)
    training, references = _footage(config)
    captions = [] if request.quick else [clip.caption for clip in training.clips]
    on_captions = training_cells(captions, adapter, settings.trigger, settings.training_captions)
    folder = request.output or evaluation_folder(config)
    return Scene(folder, cells, on_captions, adapter, of_run, training, references)


def check_networks(config: Config, *, sampling: bool) -> None:
    """Tell before hours of sampling which network cannot be had. UserError for one that the configuration asks for.

    A default that the hub does not give is told here, and will be a gap in the report. With clips made elsewhere nothing is
    lost by waiting, and every network is such a gap; a wrong aesthetic head, which `score` refuses, is a UserError there too.
    """
    if config.backbones.aesthetic is not None:
        load_aesthetic_head(Path(config.backbones.aesthetic))
    if not sampling:
        return
    defaults = BackbonesConfig()
    for key, error in unavailable(config.backbones).items():
        if getattr(config.backbones, key) != getattr(defaults, key):
            raise UserError(f"backbones.{key}: {error}") from error
        console.print(f"will not be measured (backbones.{key}): {error}", style="yellow", markup=False)


def _tell_of_few_prompts(cells: Iterable[Cell], *, quick: bool) -> None:
    """What no clip can change is told before the clips are made."""
    prompts = len({cell.shot.prompt for cell in cells if cell.prompt_set == "trigger"})
    needed = prompts_needed(len(get_args(PrimaryAxis)), two_sided=True)
    if not quick and prompts < needed:
        asked = "1 trigger prompt is" if prompts == 1 else f"{prompts} trigger prompts are"
        told = f"{asked} too few to test: below {needed} the verdict stays open, whatever the videos show"
        console.print(f"{told}; add to evaluation.prompts, or take --quick for a look", style="yellow", markup=False)


def _footage(config: Config) -> tuple[ClipSet, ClipSet]:
    """Training clips, as far as there are any here, and references."""
    references = config.evaluation.references
    if references and not references.exists():
        raise UserError(f"evaluation.references: {references} does not exist; null takes the training clips")
    listed: list[Found] = []
    for part in parts_of(config.data):
        if part.clips.exists():
            listed.append(list_part(part, config.data))
        else:
            told = f"data.clips: {part.clips} does not exist: nothing is compared with training clips"
            console.print(told, style="yellow", markup=False)
    training, unreadable = _clips(listed)
    learnt = _learnt(config, training)
    shown, lost = _clips([list_sources(references)]) if references else (_called(learnt, config), 0)
    return (
        ClipSet(thin(learnt, _MOST_TRAINING), len(learnt), unreadable, len(training) - len(learnt)),
        ClipSet(thin(shown, _MOST_REFERENCES), len(shown), lost),
    )


def _clips(listed: Iterable[Found]) -> tuple[list[Clip], int]:
    """Those of every part that can be read, and how many cannot."""
    parts = [clips_of(found) for found in listed]
    return [clip for clips, _ in parts for clip in clips], sum(unreadable for _, unreadable in parts)


def _learnt(config: Config, clips: Sequence[Clip]) -> list[Clip]:
    """Those that training was not kept from, as the index of the data set says; all, where it is not encoded here."""
    if not index_path(config.data).is_file():
        return list(clips)
    held_out = {entry.source_sha256 for entry in read_index(config.data).of("validation")}
    if not held_out:
        return list(clips)
    paths = sorted({clip.path for clip in clips})
    with progress_bar() as bar:  # every byte of the data set is read
        files = {path: sha256_of_file(path) for path in bar.track(paths, description="clips, held out or not")}
    return [clip for clip in clips if files[clip.path] not in held_out]


def _called(training: list[Clip], config: Config) -> list[Clip]:
    """Clips whose captions hold the trigger; those beside them keep the model's own look. All, where captions never say it."""
    trigger = config.evaluation.trigger
    return [clip for clip in training if calls(clip.caption, trigger)] or training


def _refuse_other_worlds(config: Config, cells: tuple[Cell, ...], *, made: bool) -> None:
    """The drawn world's judge reads its own sentences and sizes only."""
    if DRAWN_WORLD in (config.backbones.text, config.backbones.video_text):
        sample = config.sample
        require_drawn(cells, (sample.frames, sample.height, sample.width) if made else None)

"""What an evaluation is about: which clips, where they lie, and what they are set against. What cannot work is told here."""

from dataclasses import dataclass
from pathlib import Path

from mochi_lora.commands.run_folder import evaluation_folder, final_adapter, step_adapters
from mochi_lora.config.requests import EvaluationRequest
from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.data.mix import list_part, parts_of
from mochi_lora.data.sources import list_sources
from mochi_lora.errors import UserError
from mochi_lora.evaluation.footage import Clip, clips_of
from mochi_lora.evaluation.grid import Cell, plan, quick_part, thin, training_cells
from mochi_lora.evaluation.prompts import contains_trigger, prompt_sets
from mochi_lora.evaluation.truth import require_drawn
from mochi_lora.evaluation.videos import from_videos
from mochi_lora.measures.backbones import DRAWN_WORLD

_MOST_CLIPS = 128  # of the data set: references and training clips beyond would only take time


@dataclass(frozen=True)
class Scene:
    """One evaluation before anything is made or measured."""

    folder: Path  # of the report; the cells' videos are relative to it, because the report links to them
    cells: tuple[Cell, ...]
    on_captions: tuple[Cell, ...]  # for memorisation only
    adapter: Path | None  # None: clips made elsewhere
    checkpoints: tuple[tuple[int, Path], ...]
    training: list[Clip]
    references: list[Clip]

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
        return Scene(request.from_videos, cells, (), None, (), *_footage(config))
    sets = prompt_sets(settings)
    adapter = request.adapter or final_adapter(config)
    if not adapter.is_file():
        message = f"{adapter}: there is no such adapter; train first, or give --adapter PATH"
        raise UserError(message)
    of_run = () if request.quick or request.adapter else thin(step_adapters(config), settings.curve_checkpoints)
    cells = plan(sets, adapter, settings, checkpoints=of_run, quick=request.quick)
    _refuse_other_worlds(config, cells, made=True)
    training, references = _footage(config)
    captions = [] if request.quick else [clip.caption for clip in training]
    on_captions = training_cells(captions, adapter, settings.trigger, settings.training_captions)
    folder = request.output or evaluation_folder(config)
    return Scene(folder, cells, on_captions, adapter, of_run, training, references)


def _footage(config: Config) -> tuple[list[Clip], list[Clip]]:
    """Training clips, as far as there are any here, and references."""
    references = config.evaluation.references
    if references and not references.exists():
        raise UserError(f"evaluation.references: {references} does not exist; null takes the training clips")
    training: list[Clip] = []
    for part in parts_of(config.data):
        if part.clips.exists():
            training += clips_of(list_part(part, config.data))[0]
        else:
            told = f"data.clips: {part.clips} does not exist: nothing is compared with training clips"
            console.print(told, style="yellow", markup=False)
    shown = clips_of(list_sources(references))[0] if references else _called(training, config.evaluation.trigger)
    return list(thin(training, _MOST_CLIPS)), list(thin(shown, _MOST_CLIPS))


def _called(training: list[Clip], trigger: str) -> list[Clip]:
    """Clips whose captions hold the trigger; those beside them keep the model's own look. All, where captions never say it."""
    return [clip for clip in training if trigger.strip() and contains_trigger(clip.caption, trigger)] or training


def _refuse_other_worlds(config: Config, cells: tuple[Cell, ...], *, made: bool) -> None:
    """The drawn world's judge reads its own sentences and sizes only."""
    if DRAWN_WORLD in (config.backbones.text, config.backbones.video_text):
        sample = config.sample
        require_drawn(cells, (sample.frames, sample.height, sample.width) if made else None)

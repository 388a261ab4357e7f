"""`mochi-lora evaluate`: base against adapter, same prompts and seeds, to a report that says whether it worked."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from mochi_lora import __version__
from mochi_lora.commands.evaluation_losses import losses_of
from mochi_lora.commands.evaluation_output import write_everything
from mochi_lora.commands.processes import out_of_memory_named
from mochi_lora.commands.run_folder import final_adapter, held_out_losses, step_adapters
from mochi_lora.commands.videos import make_videos
from mochi_lora.config.requests import EvaluationRequest
from mochi_lora.config.schema import Config
from mochi_lora.console import console, progress_bar
from mochi_lora.errors import UserError
from mochi_lora.evaluation.bleed import bleed
from mochi_lora.evaluation.compare import compare
from mochi_lora.evaluation.copies import memorisation
from mochi_lora.evaluation.curve import CheckpointClips, curve
from mochi_lora.evaluation.footage import Clip, Footage, clips_of
from mochi_lora.evaluation.grid import ADAPTER, Cell, plan, strength_zero_is_base, thin, training_cells
from mochi_lora.evaluation.paired import BASE, Design
from mochi_lora.evaluation.prompts import prompt_sets
from mochi_lora.evaluation.results import Bleed, Curve, Evaluation, Missing, Pair, Row
from mochi_lora.evaluation.scoring import Scores, looks, score
from mochi_lora.evaluation.set_distance import set_distance
from mochi_lora.evaluation.strengths import sweep
from mochi_lora.evaluation.truth import drawn_truth
from mochi_lora.evaluation.verdict import give_verdict
from mochi_lora.evaluation.videos import from_videos
from mochi_lora.files import only_one
from mochi_lora.measures.backbones import DRAWN_WORLD
from mochi_lora.measures.catalogue import MEASURES
from mochi_lora.measures.features import FeatureCache
from mochi_lora.model.plan import resolve_device

_MOST_CLIPS = 128  # of the data set: references and training clips beyond would only take time
_SETS = ("trigger", "plain", "unrelated")
_T = TypeVar("_T")


@out_of_memory_named()
def run(config: Config, request: EvaluationRequest) -> Path:
    """Make the videos that are not there yet, measure, conclude, report; returns the report's path. Raises UserError."""
    scene = _Scene.of(config, request)
    with only_one(scene.folder, "evaluating"):
        if not request.from_videos:
            videos = {cell.shot.video for cell in (*scene.cells, *scene.on_captions)}
            console.print(f"videos   {len(videos)} for {scene.prompts} prompts, in {scene.folder}", markup=False)
            make_videos(config, [cell.shot for cell in (*scene.cells, *scene.on_captions)], scene.footage_folder)
        scores, footage = _measure(config, scene)
        evaluation, rows = _conclude(config, request, scene, scores, footage)
        return write_everything(config, scene.folder, evaluation, rows)


@dataclass(frozen=True)
class _Scene:
    """What is evaluated: which clips, where they lie, and what they are set against."""

    folder: Path  # of the report
    footage_folder: Path  # that the cells' paths are relative to; the same, because reports link to videos
    cells: tuple[Cell, ...]
    on_captions: tuple[Cell, ...]  # for memorisation only
    adapter: Path | None
    checkpoints: tuple[tuple[int, Path], ...]
    training: list[Clip]
    references: list[Clip]

    @classmethod
    def of(cls, config: Config, request: EvaluationRequest) -> "_Scene":
        settings = config.evaluation
        training = _data_clips(config.data.clips) if config.data.clips.exists() else []
        references = _data_clips(settings.references) if settings.references else training
        if request.from_videos:
            cells = from_videos(request.from_videos, settings.trigger)
            return cls(request.from_videos, request.from_videos, cells, (), None, (), training, references)
        adapter = request.adapter or final_adapter(config)
        if not adapter.is_file():
            message = f"{adapter}: there is no such adapter; train first, or give --adapter PATH"
            raise UserError(message)
        folder = request.output or config.run.folder / "evaluation"
        of_run = () if request.quick or request.adapter else tuple(thin(step_adapters(config), settings.curve_checkpoints))
        cells = plan(prompt_sets(settings), adapter, settings, checkpoints=of_run, quick=request.quick)
        captions = [] if request.quick else [clip.caption for clip in training]
        on_captions = training_cells(captions, adapter, settings.trigger, settings.training_captions)
        return cls(folder, folder, cells, on_captions, adapter, of_run, training, references)

    @property
    def prompts(self) -> int:
        """How many different ones."""
        return len({cell.shot.prompt for cell in (*self.cells, *self.on_captions)})


def _data_clips(data: Path) -> list[Clip]:
    clips, _ = clips_of(data)
    return list(thin(clips, _MOST_CLIPS))


def _measure(config: Config, scene: _Scene) -> tuple[Scores, Footage]:
    clips = len({cell.shot.video for cell in scene.cells})
    cache = FeatureCache(scene.folder / "features")
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=looks(config.backbones, clips, len(scene.references)))
        footage = Footage(cache, config.evaluation.frames_per_clip, partial(bar.update, task, advance=1))
        device = resolve_device(config.engine.device)
        scores = score(scene.cells, scene.footage_folder, scene.references, footage, config.backbones, device)
        bar.update(task, completed=bar.tasks[task].total)
    return scores, Footage(cache, config.evaluation.frames_per_clip)


def design_of(config: Config, *, quick: bool) -> Design:
    """One measure per axis carries the verdict, by what is configured and not by what comes out."""
    alignment = "align.clip" if config.backbones.text is not None else "align.video"
    quality = "quality.subject_consistency"
    return Design(
        primaries={"style": "style.descriptor", "alignment": alignment, "quality": quality},
        margins={alignment: config.evaluation.alignment_margin, quality: config.evaluation.quality_margin},
        seed=config.run.seed,
        resamples=config.evaluation.resamples,
        quick=quick,
    )


def _conclude(
    config: Config, request: EvaluationRequest, scene: _Scene, scores: Scores, footage: Footage
) -> tuple[Evaluation, tuple[Row, ...]]:
    rows, design = scores.rows(scene.cells), design_of(config, quick=request.quick)
    gaps = list(scores.missing)
    measured = [name for name in MEASURES if any(name in row.values for row in rows)]
    comparisons, missing = compare(rows, measured, design)
    gaps += missing
    leaks: tuple[Bleed, ...] = ()
    if not request.quick:
        leaks, missing = bleed(rows, design)
        gaps += missing
    strengths = _or_gap(sweep(rows, design), gaps)
    checkpoints = _curve(config, scene, rows, design) if scene.checkpoints else None
    copies = _or_gap(memorisation((*scene.cells, *scene.on_captions), scene.footage_folder, scene.training, footage), gaps)
    apart = (
        _or_gap(set_distance(scene.cells, scores.background, scores.references, config.run.seed), gaps)
        if scores.background
        else None
    )
    losses = _or_gap(losses_of(config, scene.adapter), gaps) if scene.adapter and not request.quick else None
    verdict = give_verdict(comparisons, leaks, copies, strengths, checkpoints, gaps, quick=request.quick)
    truth = (
        drawn_truth(scene.cells, scene.footage_folder)
        if DRAWN_WORLD in (config.backbones.text, config.backbones.video_text)
        else {}
    )
    evaluation = Evaluation(
        title=str(scene.adapter or request.from_videos),
        adapter=str(scene.adapter or request.from_videos),
        base_model=config.model.base,
        quick=request.quick,
        comparable=scores.comparable,
        backbones=scores.backbones,
        settings=_settings(config, request, scene),
        verdict=verdict,
        comparisons=comparisons,
        missing=tuple(gaps),
        bleed=leaks,
        distance=apart,
        memorisation=copies,
        strength_zero_is_base=None if request.from_videos else strength_zero_is_base(scene.cells, scene.footage_folder),
        sweep=strengths,
        curve=checkpoints,
        losses=losses or (),
        pairs=_pairs(scene.cells),
        truth=truth,
    )
    return evaluation, rows


def _or_gap(found: _T | Missing, gaps: list[Missing]) -> _T | None:
    """What was found, or None with its reason kept."""
    if isinstance(found, Missing):
        gaps.append(found)
        return None
    return found


def _curve(config: Config, scene: _Scene, rows: Sequence[Row], design: Design) -> Curve:
    losses = held_out_losses(config)
    points = [CheckpointClips(step, f"step {step}", str(path), losses.get(step)) for step, path in scene.checkpoints]
    return curve(rows, points, design)


def _pairs(cells: Sequence[Cell]) -> tuple[Pair, ...]:
    """Base and adapter side by side, in the order they were planned."""
    adapted = {(cell.prompt_set, cell.shot.prompt, cell.shot.seed): cell for cell in cells if _is_main(cell)}
    found = []
    for cell in cells:
        other = adapted.get((cell.prompt_set, cell.shot.prompt, cell.shot.seed))
        if cell.label == BASE and other is not None:
            shot = cell.shot
            found.append(Pair(cell.prompt_set, shot.prompt, shot.seed, shot.video, other.shot.video))
    return tuple(found)


def _is_main(cell: Cell) -> bool:
    return cell.label == ADAPTER and cell.strength == 1


def _settings(config: Config, request: EvaluationRequest, scene: _Scene) -> dict[str, str]:
    """How it was made, for people and for doing it again."""
    sample = config.sample
    sets = {name: len({cell.shot.prompt for cell in scene.cells if cell.prompt_set == name}) for name in _SETS}
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    made = {
        "clips": f"{sample.frames} frames of {sample.height}x{sample.width}",
        "sampling": f"{sample.steps} steps, guidance {sample.guidance}",
    }
    return {
        "command": request.command,
        "prompts": ", ".join(f"{count} {name}" for name, count in sets.items() if count),
        "seeds": str(len({cell.shot.seed for cell in scene.cells})),
        **({} if request.from_videos else made),
        "frames measured per clip": str(config.evaluation.frames_per_clip),
        "reference clips": str(len(scene.references)),
        "training clips": str(len(scene.training)),
        "bootstrap resamples": str(config.evaluation.resamples),
        "versions": f"mochi-lora {__version__}, {libraries}",
    }

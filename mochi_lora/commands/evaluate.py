"""`mochi-lora evaluate`: base against adapter, same prompts and seeds, to a report that says whether it worked."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from mochi_lora import __version__
from mochi_lora.commands import card
from mochi_lora.commands.evaluation_losses import losses_of
from mochi_lora.commands.evaluation_output import write_everything, write_sweep_grids
from mochi_lora.commands.evaluation_scene import Scene, check_networks, set_scene
from mochi_lora.config.requests import EvaluationRequest
from mochi_lora.config.schema import Config
from mochi_lora.console import console, progress_bar
from mochi_lora.engine.plan import resolve_device
from mochi_lora.errors import UserError
from mochi_lora.evaluation.bleed import bleed
from mochi_lora.evaluation.compare import compare
from mochi_lora.evaluation.copies import PICTURES, copy_looks, memorisation
from mochi_lora.evaluation.curve import CheckpointClips, curve
from mochi_lora.evaluation.footage import Footage
from mochi_lora.evaluation.grid import ADAPTER, Cell, strength_zero_is_base
from mochi_lora.evaluation.paired import BASE, Design
from mochi_lora.evaluation.results import BandLoss, Bleed, Curve, Evaluation, Memorisation, Missing, Pair, Row, file_name
from mochi_lora.evaluation.scoring import Scores, looks, score
from mochi_lora.evaluation.set_distance import set_distance
from mochi_lora.evaluation.strengths import sweep
from mochi_lora.evaluation.truth import drawn_truth
from mochi_lora.evaluation.verdict import give_verdict
from mochi_lora.files import only_one
from mochi_lora.measures.backbones import DRAWN_WORLD
from mochi_lora.measures.catalogue import MEASURES
from mochi_lora.measures.features import FeatureCache
from mochi_lora.parallel.mesh import Layout, Ranks, share_out
from mochi_lora.runs.folder import evaluation_folder, held_out_losses
from mochi_lora.runs.processes import join_launch, out_of_memory_named
from mochi_lora.runs.videos import make_videos

_SETS = ("trigger", "plain", "unrelated")
_T = TypeVar("_T")


def run(config: Config, request: EvaluationRequest) -> Path:
    """Make the videos that are not there yet, measure, conclude, report; returns the report's path. Raises UserError.

    The processes of a launch share the videos, the looks at them and the held-out losses; the main one concludes.
    """
    with join_launch(config) as ranks, out_of_memory_named():
        return _evaluate(config, request, ranks)


def _evaluate(config: Config, request: EvaluationRequest, ranks: Ranks) -> Path:
    scene = set_scene(config, request)
    with only_one(scene.folder, "evaluating") if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            check_networks(config, sampling=scene.adapter is not None)
        if scene.adapter:
            shots = [cell.shot for cell in scene.everything]
            told = f"{len({shot.video for shot in shots})} for {scene.prompts} prompts"
            console.print(f"videos   {told}, in {scene.folder}", markup=False)
            make_videos(config, shots, scene.folder, assume_alpha_is_rank=request.assume_alpha_is_rank, ranks=ranks)
        scores, copies = _measure(config, scene, ranks, quick=request.quick)
        losses = _losses(config, request, scene, ranks)
        if ranks.rank:
            return scene.folder
        evaluation, rows = _conclude(config, request, scene, scores, copies, losses)
        page = write_everything(config, scene.folder, evaluation, rows)
        _retell_card(config, scene)
        return page


def _retell_card(config: Config, scene: Scene) -> None:
    """What a card shows of an evaluation lies in the run's own folder for it."""
    if scene.adapter is None or scene.folder != evaluation_folder(config):
        return
    try:
        card.retell(config, scene.adapter)
    except UserError as error:
        console.print(f"the model card was left as it is: {error}", style="yellow", markup=False)


def _measure(config: Config, scene: Scene, ranks: Ranks, *, quick: bool) -> tuple[Scores, Memorisation | Missing]:
    wanted = len({cell.shot.video for cell in scene.cells})
    with progress_bar() as bar:
        references, training = scene.references.clips, scene.training
        every = looks(config.backbones, wanted, len(references)) + copy_looks(scene.everything, len(training.clips))
        world = ranks.layout.world
        total = -(-every // world)
        task = bar.add_task("measuring", total=total)
        step = partial(bar.update, task, advance=1)
        share = partial(share_out, ranks=Ranks(Layout(world), ranks.rank))  # each clip is one process's, whoever made it
        footage = Footage(FeatureCache(scene.folder / "features"), config.evaluation.frames_per_clip, step, share)
        device = resolve_device(config.engine.device)
        scores = score(scene.cells, scene.folder, references, footage, config.backbones, device)
        pictures = file_name(PICTURES, quick=quick) if ranks.rank == 0 else None
        copies = memorisation(scene.everything, scene.folder, training.clips, footage, pictures, told=training.told)
        bar.update(task, completed=total)  # what could not be had was not looked at
    return scores, copies


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
    config: Config,
    request: EvaluationRequest,
    scene: Scene,
    scores: Scores,
    searched: Memorisation | Missing,
    looked: tuple[BandLoss, ...] | Missing,
) -> tuple[Evaluation, tuple[Row, ...]]:
    rows, design = scores.rows(scene.cells), design_of(config, quick=request.quick)
    gaps = [*scores.missing, *_left_out(config, scene, request)]
    measured = [name for name in MEASURES if any(name in row.values for row in rows)]
    comparisons, missing = compare(rows, measured, design)
    gaps += missing
    leaks: tuple[Bleed, ...] = ()
    if not request.quick:
        leaks, missing = bleed(rows, design)
        gaps += missing
    strengths = _or_gap(sweep(rows, design), gaps) if _is_sweep(scene.cells) else None
    checkpoints = _curve(config, scene, rows, design) if scene.checkpoints else None
    copies = _or_gap(searched, gaps)
    background, references = scores.background, scores.references
    apart = _or_gap(set_distance(scene.cells, background, references, design), gaps) if background else None
    losses = _or_gap(looked, gaps) or ()
    verdict = give_verdict(comparisons, leaks, copies, strengths, checkpoints, gaps, design, losses=losses)
    shown = {*measured, *([apart.measure] if apart else [])}
    drawn = DRAWN_WORLD in (config.backbones.text, config.backbones.video_text)
    cache = FeatureCache(scene.folder / "features")
    evaluation = Evaluation(
        title=str(scene.adapter or request.from_videos),
        adapter=str(scene.adapter or request.from_videos),
        base_model=config.model.base if scene.adapter else "not known, the clips were made elsewhere",
        quick=request.quick,
        incomparable=tuple(name for name in MEASURES if name in scores.incomparable and name in shown),
        backbones=scores.backbones,
        settings=_settings(config, request, scene),
        verdict=verdict,
        comparisons=comparisons,
        missing=tuple(gaps),
        bleed=leaks,
        distance=apart,
        memorisation=copies,
        strength_zero_is_base=strength_zero_is_base(scene.cells, scene.folder) if scene.adapter else None,
        sweep=strengths,
        curve=checkpoints,
        losses=losses,
        pairs=_pairs(scene.cells),
        grids=write_sweep_grids(scene.folder, scene.cells, quick=request.quick) if _is_sweep(scene.cells) else (),
        truth=drawn_truth(scene.cells, scene.folder, cache) if drawn else {},
    )
    return evaluation, rows


def _left_out(config: Config, scene: Scene, request: EvaluationRequest) -> list[Missing]:
    """Parts that this evaluation does not try, other than by a setting of the configuration."""
    reasons: dict[str, str] = {}
    if scene.adapter is None:
        reasons |= dict.fromkeys(("sweep", "curve", "losses"), "the clips were made elsewhere, and the adapter is not here")
    elif config.evaluation.curve_checkpoints and request.adapter:
        reasons["curve"] = "one adapter was named (--adapter), and a curve is of the checkpoints of a run"
    elif config.evaluation.curve_checkpoints and not scene.checkpoints:
        reasons["curve"] = f"{config.run.folder / 'adapters'} holds no checkpoint of this run"
    if request.quick:
        reasons |= dict.fromkeys(("bleed", "curve", "losses"), "a quick look leaves this out")
    return [Missing(part, because) for part, because in reasons.items()]


def _or_gap(found: _T | Missing, gaps: list[Missing]) -> _T | None:
    """What was found, or None with its reason kept."""
    if isinstance(found, Missing):
        gaps.append(found)
        return None
    return found


def _is_sweep(cells: Sequence[Cell]) -> bool:
    """Whether another strength was asked for than 0, the base's, and 1, the comparison's."""
    return any(cell.label == ADAPTER and cell.strength not in (0, 1) for cell in cells)


def _losses(config: Config, request: EvaluationRequest, scene: Scene, ranks: Ranks) -> tuple[BandLoss, ...] | Missing:
    if scene.adapter is None or request.quick:
        return ()
    assumed = request.assume_alpha_is_rank
    return losses_of(config, scene.adapter, assume_alpha_is_rank=assumed, ranks=ranks)


def _curve(config: Config, scene: Scene, rows: Sequence[Row], design: Design) -> Curve:
    losses = held_out_losses(config)
    points = [CheckpointClips(step, f"step {step}", str(path), losses.get(step)) for step, path in scene.checkpoints]
    return curve(rows, points, design)


def _pairs(cells: Sequence[Cell]) -> tuple[Pair, ...]:
    """Base and adapter side by side, in the order they were planned."""
    adapted = {
        (cell.prompt_set, cell.shot.prompt, cell.shot.seed): cell
        for cell in cells
        if cell.label == ADAPTER and cell.is_compared
    }
    found = []
    for cell in cells:
        other = adapted.get((cell.prompt_set, cell.shot.prompt, cell.shot.seed))
        if cell.label == BASE and other is not None:
            shot = cell.shot
            found.append(Pair(cell.prompt_set, shot.prompt, shot.seed, shot.video, other.shot.video))
    return tuple(found)


def _settings(config: Config, request: EvaluationRequest, scene: Scene) -> dict[str, str]:
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
        "reference clips": scene.references.told,
        "training clips": scene.training.told,
        "bootstrap resamples": str(config.evaluation.resamples),
        "versions": f"mochi-lora {__version__}, {libraries}",
    }

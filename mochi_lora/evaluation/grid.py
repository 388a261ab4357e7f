"""Which clips an evaluation needs. Cells that mean the same video share it, so that it is made once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import EvaluationConfig
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.prompts import EvaluationPrompt, PromptSets, without_trigger
from mochi_lora.evaluation.results import PromptSet, Row
from mochi_lora.files import digest_of, sha256_of_file
from mochi_lora.inference.shots import Shot, frames_digest
from mochi_lora.inference.video import first_words

ADAPTER = "adapter"  # the label of what is evaluated, beside BASE; a checkpoint's is "step N"
STRENGTH = 1.0  # at which it is compared with the base, on all sets
QUICK_PROMPTS = 8
QUICK_STRENGTHS = (0.0, 0.5, 1.0)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Cell:
    """One clip to be measured: where it stands in the evaluation, and how it is made."""

    prompt_set: PromptSet
    label: str
    strength: float  # 0 for the base
    content: str  # the prompt without the trigger
    shot: Shot

    @property
    def is_compared(self) -> bool:
        """The base's, or the evaluated adapter's at the strength at which it is compared."""
        return self.label == BASE or (self.label == ADAPTER and self.strength == STRENGTH)

    def row(self, values: dict[str, float]) -> Row:
        """This cell with what was measured."""
        shot = self.shot
        return Row(shot.video, self.prompt_set, shot.prompt, shot.seed, self.label, self.strength, values)


def plan(
    sets: PromptSets,
    adapter: Path,
    settings: EvaluationConfig,
    *,
    checkpoints: Sequence[tuple[int, Path]] = (),
    quick: bool = False,
) -> tuple[Cell, ...]:
    """Every cell of an evaluation of the file `adapter`; `checkpoints` are (step, adapter file) of its run.

    Base and adapter (at strength 1) on all three sets; on the trigger prompts also the other strengths, and at most
    `curve_checkpoints` checkpoints.
    At strength 0 a cell shares the base's video, but for the first, which is really made with the adapter at 0 and proves
    that this is right (`strength_zero_is_base`). A checkpoint whose file equals the adapter's shares the adapter's videos.
    `quick`: the first 8 trigger prompts with their first seeds, three strengths, no checkpoints and no proof.
    """
    if quick:
        trigger = [(prompt, prompt.seeds[0]) for prompt in sets.trigger[:QUICK_PROMPTS]]
        asked = trigger
    else:
        trigger = list(_seeded(sets.trigger))
        asked = [*trigger, *_seeded(sets.plain), *_seeded(sets.unrelated)]
    cells = [_cell(*item, BASE) for item in asked]
    main = AdapterChoice(adapter, STRENGTH)
    cells += [_cell(*item, ADAPTER, main, main) for item in asked]
    for strength in sorted(set(QUICK_STRENGTHS if quick else settings.strengths) - {STRENGTH}):
        chosen = AdapterChoice(adapter, strength)
        cells += [_cell(*item, ADAPTER, chosen, main, proof=not at and not quick) for at, item in enumerate(trigger)]
    for step, path in () if quick else thin(checkpoints, settings.curve_checkpoints):
        same = sha256_of_file(path) == sha256_of_file(adapter)
        chosen = main if same else AdapterChoice(path, STRENGTH)
        cells += [_cell(*item, f"step {step}", chosen, main) for item in trigger]
    return tuple(cells)


def training_cells(captions: Sequence[str], adapter: Path, trigger: str, at_most: int) -> tuple[Cell, ...]:
    """Base and adapter on captions they were trained on, where a copy is likeliest to show; seed 0, evenly chosen captions."""
    prompts = [
        EvaluationPrompt(text, without_trigger(text, trigger), "training", (0,))
        for text in thin(list(dict.fromkeys(captions)), at_most)
    ]
    main = AdapterChoice(adapter, STRENGTH)
    cells = [_cell(prompt, 0, BASE) for prompt in prompts]
    return tuple(cells + [_cell(prompt, 0, ADAPTER, main, main) for prompt in prompts])


def quick_part(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Of clips made elsewhere what a quick evaluation looks at: 8 trigger prompts, the first seed of each."""
    seeds: dict[str, int] = {}
    for cell in cells:
        if cell.prompt_set == "trigger" and (cell.shot.prompt in seeds or len(seeds) < QUICK_PROMPTS):
            seeds[cell.shot.prompt] = min(cell.shot.seed, seeds.get(cell.shot.prompt, cell.shot.seed))
    return tuple(cell for cell in cells if cell.prompt_set == "trigger" and seeds.get(cell.shot.prompt) == cell.shot.seed)


def thin(items: Sequence[_T], at_most: int) -> tuple[_T, ...]:
    """At most `at_most` of `items`, evenly spaced; the last is always among them, the first where there is room for two."""
    if at_most >= len(items):
        return tuple(items)
    if at_most < 2:
        return tuple(items[-at_most:] if at_most else ())
    return tuple(items[round(number * (len(items) - 1) / (at_most - 1))] for number in range(at_most))


def strength_zero_is_base(cells: Sequence[Cell], folder: Path) -> bool | None:
    """Whether the adapter at strength 0 made the base's frames bit for bit; None where that video was not planned."""
    base = {(cell.prompt_set, cell.shot.prompt, cell.shot.seed): cell.shot.video for cell in cells if cell.label == BASE}
    for cell in cells:
        own = base.get((cell.prompt_set, cell.shot.prompt, cell.shot.seed))
        if own and cell.label == ADAPTER and cell.strength == 0 and cell.shot.video != own:
            return frames_digest(folder / cell.shot.video) == frames_digest(folder / own)
    return None


def _seeded(prompts: Iterable[EvaluationPrompt]) -> Iterator[tuple[EvaluationPrompt, int]]:
    return ((prompt, seed) for prompt in prompts for seed in prompt.seeds)


def _cell(
    prompt: EvaluationPrompt,
    seed: int,
    label: str,
    chosen: AdapterChoice | None = None,
    main: AdapterChoice | None = None,
    *,
    proof: bool = False,
) -> Cell:
    strength = chosen.strength if chosen else 0.0
    adapters = (chosen,) if chosen and (strength or proof) else ()
    if not adapters:
        folder = BASE
    elif chosen == main:
        folder = ADAPTER
    else:
        folder = f"{ADAPTER}-{strength:g}" if label == ADAPTER else label.replace(" ", "-")
    # The digest keeps apart prompts that begin alike.
    name = f"{first_words(prompt.text)}-{digest_of(prompt.text)[:8]}-seed{seed}.mp4"
    return Cell(prompt.prompt_set, label, strength, prompt.content, Shot(f"{folder}/{name}", prompt.text, seed, adapters))

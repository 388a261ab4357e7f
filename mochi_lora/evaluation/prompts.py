"""The prompts of an evaluation, in three sets: with the trigger, the same without it, and about other things."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mochi_lora.config.requests import PromptLine, read_prompt_lines
from mochi_lora.config.schema import EvaluationConfig
from mochi_lora.data.trigger import called, calls
from mochi_lora.errors import UserError
from mochi_lora.evaluation.results import PromptSet

# Everyday contents that differ in subject, place, light and motion, and name no look.
UNRELATED = (
    "a golden retriever runs along a beach, waves behind it",
    "steam rises from a cup of coffee on a wooden table",
    "cars drive over a bridge at night, their lights reflected in the river",
    "a woman in a red coat walks through a park in autumn",
    "a chef slices vegetables in a bright kitchen",
    "snow falls on a quiet street between old houses",
    "an old sailing ship on the open sea under heavy clouds",
    "a hot air balloon rises over green hills in the morning",
)
_DANGLING = r"(?:\b(?:in|with|as|of|by|using)\s+(?:(?:a|an|the)\s+)?)?"


@dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt and the seeds it is made with."""

    text: str
    content: str  # `text` without the trigger: what alignment is measured against
    prompt_set: PromptSet
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class PromptSets:
    """`plain` holds the contents of `trigger`, in the same order and with the same seeds."""

    trigger: tuple[EvaluationPrompt, ...]
    plain: tuple[EvaluationPrompt, ...]
    unrelated: tuple[EvaluationPrompt, ...]


def without_trigger(prompt: str, trigger: str) -> str:
    """`prompt` as somebody would have written it without the trigger: no stray comma, blank or "in" is left behind.

    An empty trigger changes nothing.
    """
    if not trigger.strip():
        return prompt
    words = called(trigger)
    at_the_end = re.compile(rf"{_DANGLING}{words.pattern}(?=\s*(?:[,.;:!?]|$))", re.IGNORECASE)
    text = words.sub("", at_the_end.sub("", prompt))
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"[,.;:]+(?=[,.;:!?])", "", text)  # of neighbours the last one stays
    return re.sub(r"^[\s,.;:!?]+|[\s,;:]+$", "", text)


def prompt_sets(settings: EvaluationConfig) -> PromptSets:
    """The three sets as configured. Raises UserError naming the prompt for everything that would make them meaningless."""
    lines = [PromptLine(prompt.strip()) for prompt in settings.prompts]
    lines += read_prompt_lines(settings.prompts_file) if settings.prompts_file else []
    asked = [line for line in lines if line.prompt_set != "unrelated"]
    others = [line for line in lines if line.prompt_set == "unrelated"]
    if settings.unrelated is not None or not others:
        others += [PromptLine(text.strip()) for text in (UNRELATED if settings.unrelated is None else settings.unrelated)]
    _require_trigger(settings.trigger, asked, others)
    trigger = _merged(asked, settings.seeds, "trigger", settings.trigger)
    plain = tuple(EvaluationPrompt(item.content, item.content, "plain", item.seeds) for item in trigger)
    unrelated = _merged(others, settings.seeds, "unrelated", settings.trigger)
    _refuse_same_contents(trigger, unrelated)
    return PromptSets(trigger, plain, unrelated)


def _require_trigger(trigger: str, asked: Sequence[PromptLine], others: Sequence[PromptLine]) -> None:
    if not any(line.prompt for line in asked):
        raise UserError("no prompt to evaluate: give evaluation.prompts or evaluation.prompts_file, each with the trigger word")
    if not trigger.strip():
        message = "evaluation.trigger is empty: give the word or words that call the adapter, as the captions have them"
        raise UserError(message)
    if lacking := [line.prompt for line in asked if not calls(line.prompt, trigger)]:
        message = f"the trigger {trigger!r} is missing in {_named(lacking)}"
        raise UserError(f"{message}; write it as the training captions do, or put the prompt into evaluation.unrelated")
    if calling := [line.prompt for line in others if calls(line.prompt, trigger)]:
        message = f"the trigger {trigger!r} is in {_named(calling)} among the unrelated prompts"
        raise UserError(f"{message}; take it out of evaluation.unrelated: they show what the adapter does uncalled")
    if bare := [line.prompt for line in asked if not without_trigger(line.prompt, trigger)]:
        raise UserError(f"{_named(bare)} holds nothing but the trigger {trigger!r}; say what the clip shows as well")


def _merged(lines: Iterable[PromptLine], seeds: int, prompt_set: PromptSet, trigger: str) -> tuple[EvaluationPrompt, ...]:
    """One entry per prompt, with the seeds that its lines fix, or with all of `seeds`. Raises UserError for repetitions."""
    fixed: dict[str, list[int | None]] = defaultdict(list)
    for line in lines:
        fixed[line.prompt].append(line.seed)
    merged = []
    for text, own in fixed.items():
        if len(set(own)) < len(own) or (None in own and len(own) > 1):
            raise UserError(f"{_named([text])} is there {len(own)} times; keep one, or give each line another seed")
        chosen = tuple(range(seeds)) if own == [None] else tuple(seed for seed in own if seed is not None)
        merged.append(EvaluationPrompt(text, without_trigger(text, trigger), prompt_set, chosen))
    return tuple(merged)


def _refuse_same_contents(trigger: Sequence[EvaluationPrompt], unrelated: Sequence[EvaluationPrompt]) -> None:
    """The prompt is the unit of every test: two that say the same would count one finding twice."""
    first: dict[str, str] = {}
    for item in (*trigger, *unrelated):
        same = first.setdefault(item.content.casefold(), item.text)
        if same != item.text:
            raise UserError(f"{same!r} and {item.text!r} are one prompt but for the trigger; keep one of them")


def _named(prompts: Sequence[str]) -> str:
    more = f" and {len(prompts) - 3} more" if len(prompts) > 3 else ""
    return f"prompt{'s' if len(prompts) > 1 else ''} {', '.join(map(repr, prompts[:3]))}{more}"

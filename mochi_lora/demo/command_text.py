"""The exact settings of a wish as `mochi-lora sample` commands."""

import json
import shlex
from collections.abc import Iterator, Sequence

from mochi_lora.config.engine import EngineConfig
from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.demo.form import Wish
from mochi_lora.engine.plan import Plan

# Of a plan: its sizes of `parallel` are set by hand, and what else is in it changes no frame.
_CHANGE_FRAMES = ("precision", "attention", "compile", "guidance_passes")
_ON_THE_PAGE = ("negative_prompt", "frames", "height", "width", "steps", "guidance")


def sample_commands(wish: Wish, configured: SampleConfig, started_with: Sequence[str]) -> str:
    """A command for each video of `wish`, one a line.

    `started_with` are the words that chose the configuration (--config=FILE and overrides, each with its value by `=`),
    `configured` is what they make.
    """
    kinds: list[tuple[AdapterChoice, ...]] = [wish.adapters]
    if wish.adapters and wish.compare:
        kinds.insert(0, ())
    settings = list(_settings(wish.settings, configured))
    said = {setting.partition("=")[0] for setting in settings}
    before = [word for word in started_with if word.partition("=")[0] not in said]
    return "\n".join(shlex.join(["mochi-lora", "sample", *before, *_words(wish, adapters), *settings]) for adapters in kinds)


def settled(started_with: Sequence[str], engine: EngineConfig, plan: Plan) -> tuple[str, ...]:
    """`started_with`, naming what the demo's plan made of `auto` where that changes frames: `sample` plans for the size asked
    for and without T5 beside it, and would settle some of it otherwise.
    """
    found = {f"--engine.{name}": getattr(plan, name) for name in _CHANGE_FRAMES if getattr(engine, name) == "auto"}
    found = {name: value for name, value in found.items() if value != "auto"}  # on a CPU attention stays torch's own choice
    kept = [word for word in started_with if word.partition("=")[0] not in found]
    return (*kept, *(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in found.items()))


def _words(wish: Wish, adapters: Sequence[AdapterChoice]) -> Iterator[str]:
    """Values hang on their names by `=`, so that one may begin with a dash."""
    yield f"--prompt={wish.prompt}"
    yield f"--seed={wish.seed}"
    yield from (f"--adapter={choice.path}:{choice.strength!r}" for choice in adapters)
    if not adapters:
        yield "--base-only"


def _settings(asked: SampleConfig, configured: SampleConfig) -> Iterator[str]:
    """What the page sets, as overrides. Where a preset goes, all that it stood for is said."""
    names = SampleConfig.model_fields if asked.preset != configured.preset else _ON_THE_PAGE
    values = asked.model_dump(mode="json", include=set(names) - {"prompts", "seeds", "strength"})
    for name, value in sorted(values.items()):
        yield f"--sample.{name}={value if isinstance(value, str) else json.dumps(value)}"

"""The exact settings of a wish as `mochi-lora sample` commands."""

import json
import shlex
from collections.abc import Iterator, Sequence

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.demo.form import Wish

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

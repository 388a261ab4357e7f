"""The model card: README.md of a published adapter, its front matter as the hub reads it.

Everything in it is meant for strangers' eyes: it knows no path of the machine it is written on.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Template

from mochi_lora import spec
from mochi_lora.evaluation.results import Evaluation
from mochi_lora.files import write_text
from mochi_lora.report import wording
from mochi_lora.report.markdown import code, plain
from mochi_lora.report.templating import page_environment

NAME = "README.md"
REPOSITORY = "OWNER/NAME"  # stands for the repository until there is one
_SEAL = re.compile(r"<!-- mochi-lora card ([0-9a-f]{16}) -->\n\Z")
_TAGS = ("text-to-video", "diffusers", "lora", "template:sd-lora", "mochi-lora")


@dataclass(frozen=True)
class Film:
    """A video to show; paths relative to the card's folder."""

    prompt: str
    seed: int
    adapter: str
    base: str | None  # the same without the adapter, where there is one


@dataclass(frozen=True)
class Card:
    """Everything the card says."""

    name: str
    licence: str  # of the adapter, an identifier of the hub's
    base: str | None  # hub id; None for a local folder
    base_fingerprint: str
    step: int
    trigger: str
    settings: dict[str, Any]  # section -> setting -> value, as the adapter's header has them
    data: dict[str, Any] | None  # `data_statistics`; None in adapters of earlier versions
    films: tuple[Film, ...]
    weights: str  # file name
    comfyui: str | None  # path relative to the card's folder; None: that layout cannot hold it
    evaluation: Evaluation | None  # of this very adapter
    versions: str


def write_card(folder: Path, card: Card) -> Path:
    """Write `folder`/README.md, atomically."""
    path = folder / NAME
    text = _template().render(
        it=card,
        front=yaml.safe_dump(_front(card), sort_keys=False, allow_unicode=True, width=1000),
        REPOSITORY=REPOSITORY,
        outcome=wording.outcome(card.evaluation)[0] if card.evaluation else "",
        substitutes=wording.substitutes(card.evaluation) if card.evaluation else "",
        prompt=card.films[0].prompt if card.films else card.trigger,
    )
    write_text(path, _sealed(text))
    return path


def is_as_written(text: str) -> bool:
    """Whether nobody has changed a card since it was written here."""
    match = _SEAL.search(text)
    return match is not None and match[1] == _digest(text[: match.start()])


def licence_of(text: str) -> str:
    """The licence that a card written here names."""
    return str(yaml.safe_load(text.split("---\n", 2)[1])["license"])


def with_repository(text: str, repository: str) -> str:
    """The card with its repository's name wherever the place is kept free; a seal that was whole stays whole."""
    named = text.replace(REPOSITORY, repository)
    return _sealed(_SEAL.sub("", named)) if is_as_written(text) else named


def _sealed(text: str) -> str:
    return f"{text}<!-- mochi-lora card {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _front(card: Card) -> dict[str, Any]:
    """https://huggingface.co/docs/hub/model-cards; `instance_prompt` and `widget` are what the hub's LoRA gallery shows."""
    tags = [*_TAGS, *(["mochi-1-preview"] if card.base == spec.BASE_MODEL else [])]
    front: dict[str, Any] = {"license": card.licence, "library_name": "diffusers", "pipeline_tag": "text-to-video"}
    if card.base:
        front |= {"base_model": card.base, "base_model_relation": "adapter"}
    front["tags"] = tags
    if card.trigger:
        front["instance_prompt"] = card.trigger
    if card.films:
        front["widget"] = [{"text": film.prompt, "output": {"url": film.adapter}} for film in card.films]
    return front


@cache
def _template() -> Template:
    environment = page_environment(escaped=False, BASE_MODEL=spec.BASE_MODEL, FPS=spec.FRAMES_PER_SECOND)
    environment.filters.update({"plain": plain, "code": code, "literal": _literal, "count": _count})
    return environment.get_template("card.md")


def _literal(text: str) -> str:
    """`text` in Python's words; JSON's strings are that as well, and keep to double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"

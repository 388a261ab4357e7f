"""The models of one demo, and what a click makes with them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.demo.form import FormError, Wish
from mochi_lora.errors import UserError
from mochi_lora.files import digest_of
from mochi_lora.inference.live import LiveSampler
from mochi_lora.inference.prompts import Embedded, embed_prompts
from mochi_lora.inference.shots import Shot, describe, is_made, told_settings, write_video
from mochi_lora.inference.video import first_words
from mochi_lora.model.text import TextEncoder

Side = Literal["base", "adapter"]
_REMEMBERED = 64  # prompt pairs with their embeddings, up to 8 MiB each


@dataclass(frozen=True)
class Progress:
    """`done` of `steps` denoising steps of one video are made."""

    side: Side
    done: int
    steps: int
    seconds_left: float | None  # until the last video; None before the first step


@dataclass(frozen=True)
class Phase:
    """Something without steps has begun."""

    text: str


@dataclass(frozen=True)
class Filmed:
    """One side's video is there."""

    side: Side
    path: Path


Event = Progress | Phase | Filmed
NAMES: dict[Side, str] = {"base": "base video", "adapter": "adapter video"}


@dataclass(frozen=True)
class _Scene:
    side: Side
    shot: Shot
    path: Path
    about: dict[str, Any]
    made_before: bool


@dataclass(frozen=True)
class Made:
    """Outcome of a click."""

    notes: tuple[str, ...]  # what became of the prompt's words, and what was there already


class Session:
    """T5 and a live sampler, kept for the whole demo. One call at a time."""

    def __init__(
        self,
        sampler: LiveSampler,
        text: TextEncoder,
        folder: Path,
        origin: dict[str, Any],
        *,
        device: torch.device,
        offload: bool,
    ) -> None:
        """Videos go to `folder`, with all that made them beside them; `origin` is what `describe` wants, but
        for the settings of `sample`, which each wish brings.
        """
        self._sampler = sampler
        self._text = text
        self._folder = folder
        self._origin = origin
        self._device = device
        self._offload = offload
        self._embedded: dict[tuple[str, str], Embedded] = {}

    def make(self, wish: Wish, report: Callable[[Event], None], cancelled: Callable[[], bool]) -> Made:
        """Make the videos of `wish`, the base first; one made before with the same settings is taken as it is.

        Raises FormError for what the fields can mend, other UserErrors, and `sampler.Cancelled`.
        """
        report(Phase("Reading the prompt"))
        embedded = self._embed(wish)
        scenes = self._scenes(wish)
        clock = _Clock(steps=wish.settings.steps * sum(not scene.made_before for scene in scenes))
        for scene in scenes:
            if not scene.made_before:
                latents = self._latents(wish, scene.shot, embedded, _reporter(scene.side, clock, report), cancelled)
                self._sampler.require_unchanged({Path(item["path"]): item["sha256"] for item in scene.about["adapters"]})
                report(Phase(f"Decoding the {NAMES[scene.side]}"))
                write_video(scene.path, self._sampler.frames(latents), scene.about)
            report(Filmed(scene.side, scene.path))
        again = [f"The {NAMES[scene.side]} was made before, with the same settings." for scene in scenes if scene.made_before]
        return Made((*_notes(wish, embedded), *again))

    def _scenes(self, wish: Wish) -> "list[_Scene]":
        """Each named by its words and by all that makes it, so that other settings never overwrite it."""
        hashes = self._hold(wish.adapters)
        origin = self._origin | told_settings(wish.settings)
        sides: list[tuple[Side, tuple[AdapterChoice, ...]]] = []
        if wish.compare or not wish.adapters:
            sides.append(("base", ()))
        if wish.adapters:
            sides.append(("adapter", wish.adapters))
        scenes = []
        for side, adapters in sides:
            about = describe(Shot("", wish.prompt, wish.seed, adapters), origin, hashes)
            name = f"{first_words(wish.prompt)}-seed{wish.seed}-{digest_of(about)[:12]}.mp4"
            path = self._folder / name
            shot = Shot(name, wish.prompt, wish.seed, adapters)
            scenes.append(_Scene(side, shot, path, about, is_made(path, about)))
        return scenes

    def _latents(
        self,
        wish: Wish,
        shot: Shot,
        embedded: Embedded,
        on_step: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> torch.Tensor:
        on_step(0, wish.settings.steps)
        prompt, negative = embedded.embeddings[shot.prompt], embedded.embeddings[wish.settings.negative_prompt]
        return self._sampler.latents(
            prompt, negative, wish.settings, shot.seed, shot.adapters, on_step=on_step, cancelled=cancelled
        )

    def _embed(self, wish: Wish) -> Embedded:
        pair = (wish.prompt, wish.settings.negative_prompt)
        if pair not in self._embedded:
            self._refuse_foreign(wish)
            with self._text_on_device():
                embedded = embed_prompts(self._text, pair)
            if len(self._embedded) == _REMEMBERED:
                del self._embedded[next(iter(self._embedded))]
            self._embedded[pair] = embedded
        return self._embedded[pair]

    @contextmanager
    def _text_on_device(self) -> Iterator[None]:
        """Within, under offloading, T5 alone is there. It leaves also where memory ran out, or no later click would fit."""
        if not self._offload:
            yield
            return
        self._sampler.rest()
        try:
            self._text.to(self._device)
            yield
        finally:
            self._text.to(torch.device("cpu"))

    def _refuse_foreign(self, wish: Wish) -> None:
        fields = {"prompt": wish.prompt, "negative_prompt": wish.settings.negative_prompt}
        told = dict(zip(fields, self._text.tokenise(list(fields.values())), strict=True))
        foreign = [field for field, item in told.items() if item.unknown_share == 1]
        if foreign:
            raise FormError(dict.fromkeys(foreign, "every token is unknown to T5, which knows English: translate it"))

    def _hold(self, adapters: Sequence[AdapterChoice]) -> dict[Path, str]:
        """The files' hashes."""
        paths = [choice.path for choice in adapters]
        try:
            return {path: held.sha256 for path, held in zip(paths, self._sampler.hold(paths), strict=True)}
        except UserError as error:
            raise FormError({"adapters": str(error)}) from error


class _Clock:
    """Time left, from the steps made so far. The first one, which may compile or fetch, counts as any other."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._start = time.monotonic()

    def step(self) -> None:
        self._done += 1

    def seconds_left(self) -> float | None:
        if not self._done:
            return None
        return (time.monotonic() - self._start) / self._done * (self._steps - self._done)


def _reporter(side: Side, clock: _Clock, report: Callable[[Event], None]) -> Callable[[int, int], None]:
    def on_step(done: int, steps: int) -> None:
        if done:
            clock.step()
        report(Progress(side, done, steps, clock.seconds_left()))

    return on_step


def _notes(wish: Wish, embedded: Embedded) -> list[str]:
    notes = []
    for name, prompt in (("prompt", wish.prompt), ("negative prompt", wish.settings.negative_prompt)):
        told = embedded.told[prompt]
        if told.truncated:
            notes.append(f"The {name} was cut at 256 tokens; what comes after has no effect.")
        if told.unknown_share:
            notes.append(f"{told.unknown_share:.0%} of the {name}'s tokens are unknown to T5, which knows English.")
    return notes

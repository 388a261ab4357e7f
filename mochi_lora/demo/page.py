"""The page: fields on one side, videos on the other. Gradio shows it; what it does is `session`'s, `form`'s and `turns`'."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.demo import status
from mochi_lora.demo.command_text import sample_commands
from mochi_lora.demo.form import FIELDS, Form, FormError, Wish, read_form, shown_scales
from mochi_lora.demo.session import Event, Filmed, Made
from mochi_lora.demo.turns import AlreadyAtWorkError, Place, Turns, Waiting
from mochi_lora.errors import UserError
from mochi_lora.inference.sampler import Cancelled

_LONGEST = 163  # frames, what Mochi was trained up to; the slider goes further where the configuration does
_STRONGEST = 2.0
_NEW_SEED = "() => String(Math.floor(Math.random() * 2 ** 31))"

Make = Callable[[Wish, Callable[[Event], None], Callable[[], bool]], Made]
Update = dict[Any, Any]  # component -> what becomes of it


@dataclass(frozen=True)
class Offered:
    """An adapter that can be chosen; `choice` holds the strength its slider starts at."""

    label: str
    choice: AdapterChoice
    chosen: bool


@dataclass(frozen=True)
class Offer:
    """What the page starts with."""

    about: str  # the line under the title
    prompt: str
    settings: SampleConfig
    adapters: tuple[Offered, ...]
    started_with: tuple[str, ...]  # the configuration's words, for the commands shown
    folder: Path  # of the videos


def build(offer: Offer, make: Make, turns: "Turns[Event, Made]") -> gr.Blocks:
    """The page. `make` fulfils a wish in a thread; `turns` sees that there is one at a time."""
    with gr.Blocks(title="mochi-lora demo", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>mochi-lora demo</h1><p>{escape(offer.about)}</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                fields = _Fields(offer)
            with gr.Column(scale=8, min_width=300):
                results = _Results(offer)
        click = _Click(offer, make, turns, fields, results)
        made = gr.on(
            [results.generate.click, fields.prompt.submit],
            click.generate,
            inputs=fields.inputs(),
            outputs={*fields.outputs(), *results.outputs()},
            show_progress="hidden",
            trigger_mode="once",
            concurrency_limit=None,  # `turns` is the queue: it knows who waits, and lets them cancel
            api_visibility="private",
        )
        failed = made.failure(  # a mistake of ours, whose traceback is in the terminal: the page stays usable
            click.fail, outputs=results.status, queue=False, show_progress="hidden", api_visibility="private"
        )
        for over in (made, failed):
            over.then(  # not with the last update: until Gradio has closed the event, it ignores clicks
                click.rest,
                outputs={results.generate, results.cancel},
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
        results.cancel.click(_cancel(turns), queue=False, show_progress="hidden", api_visibility="private")
        blocks.unload(_cancel(turns))  # a page that is closed waits for nothing
    return blocks


def theme() -> gr.themes.Base:
    """System fonts: nothing is fetched."""
    sans = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    shades = gr.themes.Default(primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    return shades.set(  # the originals are too pale to read: 4.5 to 1 is what WCAG asks for
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def _cancel(turns: "Turns[Event, Made]") -> Callable[[gr.Request], None]:
    def cancel(request: gr.Request) -> None:
        turns.cancel(_owner(request))

    return cancel


def _owner(request: gr.Request) -> str:
    assert request.session_hash is not None, "Gradio's own pages have one"
    return request.session_hash


class _Fields:
    """The left column: what can be filled in, each with room for its problem below."""

    def __init__(self, offer: Offer) -> None:
        settings = offer.settings
        self.problems: dict[str, gr.HTML] = {}
        self.prompt = gr.Textbox(
            offer.prompt, label="Prompt", lines=3, placeholder="What the video shows, in English", elem_id="prompt"
        )
        self._room("prompt")
        self.negative = gr.Textbox(
            settings.negative_prompt,
            label="Negative prompt",
            placeholder="Empty is usual",
            elem_id="negative",
        )
        self._room("negative_prompt")
        self._adapters(offer)
        with gr.Row():
            self.steps = gr.Number(settings.steps, label="Steps", min_width=90, elem_id="steps")
            self.guidance = gr.Textbox(shown_scales(settings.guidance), label="Guidance", min_width=90, elem_id="guidance")
        for name in ("steps", "guidance"):
            self._room(name)
        self.frames = gr.Slider(
            1,
            max(_LONGEST, settings.frames),
            settings.frames,
            step=6,
            label="Frames",
            info="30 a second: 1, 7, 13, ...",
            elem_id="frames",
        )
        self._room("frames")
        with gr.Row():
            self.width = gr.Number(settings.width, label="Width", step=16, min_width=90, elem_id="width")
            self.height = gr.Number(settings.height, label="Height", step=16, min_width=90, elem_id="height")
        self._room("size")
        with gr.Row(elem_id="seed-row"):
            self.seed = gr.Textbox(str(settings.seeds[0]), label="Seed", min_width=90, elem_id="seed")
            new_seed = gr.Button("New seed", size="sm", min_width=90, elem_id="new-seed")
        self._room("seed")
        new_seed.click(None, outputs=self.seed, js=_NEW_SEED, show_progress="hidden", api_visibility="private")

    def _adapters(self, offer: Offer) -> None:
        self.sliders: list[gr.Slider] = []
        choices = [(one.label, str(number)) for number, one in enumerate(offer.adapters)]
        chosen = [str(number) for number, one in enumerate(offer.adapters) if one.chosen]
        self.chosen = gr.Dropdown(
            choices, value=chosen, multiselect=True, label="Adapters", visible=bool(choices), elem_id="adapters"
        )
        for number, one in enumerate(offer.adapters):
            strength = one.choice.strength
            self.sliders.append(
                gr.Slider(
                    min(0.0, strength),
                    max(_STRONGEST, strength),
                    strength,
                    step=0.05,
                    label=f"Strength of {one.label}",
                    visible=str(number) in chosen,
                    elem_id=f"strength-{number}",
                )
            )
        self._room("adapters")
        self.compare = gr.Checkbox(
            value=True, label="Also make the base video, same seed", visible=bool(choices), elem_id="compare"
        )
        if not choices:
            gr.HTML(
                "<p>No adapter yet: videos come from the base. Train one, or start the demo with --adapter PATH.</p>",
                elem_classes="hint",
            )
            return
        self.chosen.change(
            lambda now: [gr.Slider(visible=str(number) in now) for number in range(len(self.sliders))],
            self.chosen,
            self.sliders,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def _room(self, field: str) -> None:
        assert field in FIELDS
        self.problems[field] = gr.HTML(visible=False, padding=False, elem_classes="room", elem_id=f"problem-{field}")

    def inputs(self) -> set[Any]:
        """Everything that `read` needs."""
        named = {self.prompt, self.negative, self.steps, self.guidance, self.seed, self.frames, self.width, self.height}
        return {*named, self.chosen, self.compare, *self.sliders}

    def outputs(self) -> set[Any]:
        """Everything that a click may change."""
        return set(self.problems.values())

    def read(self, values: Mapping[Any, Any], offered: tuple[Offered, ...]) -> Form:
        """The fields as they stand."""
        adapters = [
            AdapterChoice(offered[number].choice.path, float(values[self.sliders[number]]))
            for number in sorted(map(int, values[self.chosen] or []))
        ]
        return Form(
            prompt=values[self.prompt],
            negative_prompt=values[self.negative],
            steps=values[self.steps],
            guidance=values[self.guidance],
            seed=values[self.seed],
            frames=values[self.frames],
            width=values[self.width],
            height=values[self.height],
            adapters=tuple(adapters),
            compare=bool(values[self.compare]),
        )

    def say(self, problems: Mapping[str, str]) -> Update:
        """Each problem under its field, and none elsewhere."""
        return {
            room: gr.HTML(status.problem(field, problems[field]) if field in problems else "", visible=field in problems)
            for field, room in self.problems.items()
        }


class _Results:
    """The right column: the buttons, where the job stands, the videos, the commands."""

    def __init__(self, offer: Offer) -> None:
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", min_width=120, scale=3, elem_id="generate")
            self.cancel = gr.Button("Cancel", min_width=100, scale=1, interactive=False, elem_id="cancel")
        self.status = gr.HTML(status.line("Ready."), elem_id="status", padding=False)
        any_chosen = any(one.chosen for one in offer.adapters)
        with gr.Row():
            self.base = self._film("Base", "base-film", visible=True)
            self.adapter = self._film("With adapter", "adapter-film", visible=any_chosen)
        self.command = gr.Textbox(
            label="The same from the command line",
            lines=2,
            max_lines=3,
            interactive=False,
            buttons=["copy"],
            visible=False,
            elem_id="command",
        )
        self.notes = gr.HTML(visible=False, elem_classes="hint", elem_id="notes")

    @staticmethod
    def _film(label: str, name: str, *, visible: bool) -> gr.Video:
        return gr.Video(
            label=label,
            interactive=False,
            autoplay=True,
            loop=True,
            min_width=260,
            height=240,
            visible=visible,
            buttons=["download"],
            elem_id=name,
            elem_classes="film",
        )

    def outputs(self) -> set[Any]:
        """Everything that a click may change."""
        return {self.generate, self.cancel, self.status, self.base, self.adapter, self.command, self.notes}

    def working(self, *, now: bool) -> Update:
        """The buttons while something is made, and otherwise."""
        cancel = gr.Button(interactive=now, variant="stop" if now else "secondary")
        return {self.generate: gr.Button(interactive=not now), self.cancel: cancel}

    def begin(self, wish: Wish, label: str, commands: str) -> Update:
        """Empty places for the videos to come."""
        return {
            self.base: gr.Video(None, visible=wish.compare or not wish.adapters),
            self.adapter: gr.Video(None, visible=bool(wish.adapters), label=label),
            self.command: gr.Textbox(commands, visible=True),
            self.notes: gr.HTML("", visible=False),
        }

    def films(self, events: list[Event | Waiting]) -> Update:
        """The videos that have come."""
        places = {"base": self.base, "adapter": self.adapter}
        return {places[event.side]: gr.Video(str(event.path)) for event in events if isinstance(event, Filmed)}

    def stand(self, events: list[Event | Waiting]) -> Update:
        """The last word about where things stand."""
        texts = [text for event in events if (text := status.told(event)) is not None]
        return {self.status: texts[-1]} if texts else {}


class _Click:
    """What a click on Generate does, told step by step."""

    def __init__(self, offer: Offer, make: Make, turns: "Turns[Event, Made]", fields: _Fields, results: _Results) -> None:
        self._offer, self._make, self._turns = offer, make, turns
        self._fields, self._results = fields, results

    def generate(self, values: dict[Any, Any], request: gr.Request) -> Generator[Update, None, None]:
        """Everything from reading the fields to the last word. A second click changes nothing while the first is at work."""
        try:
            with self._turns.place(_owner(request)) as place:
                yield from self._generate(values, place)
        except AlreadyAtWorkError:  # a browser sends several clicks before it hears of the first
            yield {self._results.status: gr.skip()}
        except UserError as error:
            yield {self._results.status: status.line(str(error), kind="bad")}

    def _generate(self, values: dict[Any, Any], place: Place) -> Generator[Update, None, None]:
        fields, results = self._fields, self._results
        start = time.monotonic()
        try:
            wish = read_form(fields.read(values, self._offer.adapters), self._offer.settings)
            commands = sample_commands(wish, self._offer.settings, self._offer.started_with)
            yield {
                **fields.say({}),
                **results.working(now=True),
                **results.begin(wish, self._label(wish), commands),
                results.status: status.line("Beginning ..."),
            }
            work = self._turns.run(place, lambda report, cancelled: self._make(wish, report, cancelled))
            made, films = yield from self._follow(work)
        except FormError as error:
            sorry = status.line("Nothing was made: see what is in red.", kind="bad")
            yield {**fields.say(error.problems), results.status: sorry}
        except UserError as error:
            yield {results.status: status.line(str(error), kind="bad")}
        except Cancelled:
            yield {results.status: status.line("Cancelled.")}
        else:
            done = f"Done in {time.monotonic() - start:.1f} s. Videos are kept in {self._offer.folder}."
            notes = "".join(f"<li>{escape(note)}</li>" for note in made.notes)
            yield {
                **films,  # once more: both begin together, and Gradio may lose updates that come within a blink
                results.status: status.line(done),
                results.notes: gr.HTML(f"<ul>{notes}</ul>", visible=bool(notes)),
            }

    def fail(self) -> str:
        """The status after an error that nobody foresaw."""
        return status.line("Nothing was made: an error of the program, see its terminal.", kind="bad")

    def rest(self, request: gr.Request) -> Update:
        """The buttons when a click is over, which may have been one too many."""
        return self._results.working(now=self._turns.has(_owner(request)))

    def _follow(self, work: Generator[list[Event | Waiting], None, Made]) -> Generator[Update, None, tuple[Made, Update]]:
        """Tell what happens; returns the outcome with the videos."""
        films: Update = {}
        with closing(work):
            while True:
                try:
                    events = next(work)
                except StopIteration as end:
                    return end.value, films
                update = self._results.films(events)
                films |= update
                yield update | self._results.stand(events)

    def _label(self, wish: Wish) -> str:
        labels = {one.choice.path: one.label for one in self._offer.adapters}
        told = " + ".join(f"{labels[choice.path]} {choice.strength:g}" for choice in wish.adapters)
        return f"With {told}"

"""What a person filled in, checked as the configuration is: a wish that can be fulfilled, or what is wrong, field by field."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mochi_lora.config.problems import booleans_for_numbers, describe
from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import Config, SampleConfig
from mochi_lora.errors import UserError

FIELDS = ("prompt", "negative_prompt", "adapters", "steps", "guidance", "seed", "frames", "size")
# Far beyond what Mochi can do: a slip of the finger must not fill the memory before the model says no.
MOST_STEPS, MOST_FRAMES, MOST_PIXELS = 1000, 331, 2048
# Settings of the configuration that the page has no field for, or has under another name.
_FIELD_OF = {"height": "size", "width": "size", "linear_steps": "steps", "threshold_noise": "steps", "seeds[0]": "seed"}


class FormError(UserError):
    """Something filled in that cannot be used."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        """`problems`: field of FIELDS -> what is wrong with it."""
        super().__init__("\n".join(f"{field}: {text}" for field, text in problems.items()))
        self.problems = dict(problems)


@dataclass(frozen=True)
class Form:
    """The fields of the page as they stand; numbers are what the browser sent, so None or fractional may be among them."""

    prompt: str
    negative_prompt: str
    steps: float | None
    guidance: str
    seed: str
    frames: float | None
    width: float | None
    height: float | None
    adapters: tuple[AdapterChoice, ...]
    compare: bool  # the base beside the adapters


@dataclass(frozen=True)
class Wish:
    """One click of Generate, checked."""

    prompt: str
    seed: int
    settings: SampleConfig
    adapters: tuple[AdapterChoice, ...]
    compare: bool


def read_form(form: Form, defaults: SampleConfig) -> Wish:
    """What is asked for; `defaults` holds what the page has no field for. Raises FormError naming every wrong field."""
    problems = dict(_beyond(form))
    # A preset stands for values that `defaults` holds already; here they may be changed one by one.
    changes: dict[str, Any] = {"preset": None, "negative_prompt": form.negative_prompt, "frames": form.frames}
    changes |= {"steps": form.steps, "width": form.width, "height": form.height}
    try:
        changes["seeds"] = [int(form.seed)]
    except ValueError:
        problems["seed"] = f"got {form.seed.strip() or 'nothing'}, expected a whole number from 0"
    try:
        changes["guidance"] = _scales(form.guidance)
    except ValueError:
        problems["guidance"] = (
            f"got {form.guidance.strip() or 'nothing'}, expected a number, or one per step with commas between them"
        )
    if not form.prompt.strip():
        problems["prompt"] = "write what the video should show"
    # What is beyond all reason is not even tried, the schedule of a billion steps for one.
    legal = {key: value for key, value in changes.items() if _FIELD_OF.get(key, key) not in problems}
    settings = {"sample": defaults.model_dump(exclude={"prompts", "strength"}) | legal}
    for dotted, text in booleans_for_numbers(settings):
        problems.setdefault(_field(dotted), text)
    try:
        checked = Config.model_validate(settings).sample
    except ValidationError as error:
        for dotted, text in describe(error):
            problems.setdefault(_field(dotted), text)
    if problems:
        raise FormError({field: problems[field] for field in FIELDS if field in problems})
    return Wish(form.prompt, checked.seeds[0], checked, form.adapters, form.compare)


def _beyond(form: Form) -> Iterator[tuple[str, str]]:
    for field, value, most in (
        ("steps", form.steps, MOST_STEPS),
        ("frames", form.frames, MOST_FRAMES),
        ("size", form.width, MOST_PIXELS),
        ("size", form.height, MOST_PIXELS),
    ):
        if value is None:
            yield field, "got nothing, expected a whole number"
        elif value > most:
            yield field, f"got {value:g}, expected at most {most}"


def _scales(text: str) -> float | list[float]:
    scales = [float(part) for part in text.strip(" []").split(",")]
    return scales[0] if len(scales) == 1 else scales


def shown_scales(guidance: float | Sequence[float]) -> str:
    """Guidance as the form shows it."""
    return f"{guidance:g}" if isinstance(guidance, int | float) else ", ".join(f"{scale:g}" for scale in guidance)


def _field(dotted: str) -> str:
    name = dotted.removeprefix("sample.")
    return _FIELD_OF.get(name, name.partition("[")[0])

"""What is wrong with a configuration, told to people: dotted path, what we got, what is expected, what was perhaps meant."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mochi_lora.config.schema import Config
from mochi_lora.errors import UserError


class ConfigError(UserError):
    """A setting, a key or a configuration file is wrong. The command line answers with exit status 2."""


@dataclass(frozen=True)
class Problem:
    """One wrong setting: its dotted path, what is wrong with it, and the file or command line it came from."""

    path: str
    text: str
    origin: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text} ({self.origin})" if self.path else f"{self.text} ({self.origin})"


def refuse(problems: Sequence[Problem]) -> ConfigError:
    """The error that lists `problems`, one per line, without repetitions."""
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    head = "the configuration has a problem" if len(lines) == 1 else f"the configuration has {len(lines)} problems"
    return ConfigError("\n".join([f"{head}:", *(f"  {line}" for line in lines)]))


def settings_of(section: str) -> dict[str, Any]:
    """Names and annotations of one section's settings; empty for an unknown section."""
    field = Config.model_fields.get(section)
    return {name: info.annotation for name, info in field.annotation.model_fields.items()} if field else {}  # type: ignore[union-attr]


def near_settings(name: str, *, option: bool = False) -> str:
    """`; did you mean ...?` for a mistyped key or dotted path, or bare command-line option; empty if nothing is near."""
    section, _, setting = name.rpartition(".")
    everything = [f"{owner}.{key}" for owner in Config.model_fields for key in settings_of(owner)]
    same_name = [dotted for dotted in everything if dotted.endswith(f".{setting}")]
    inside = [] if option else difflib.get_close_matches(setting, settings_of(section) if section else Config.model_fields, n=1)
    near = same_name or inside or difflib.get_close_matches(name, everything, n=1, cutoff=0.7)
    told = [f"'--{dotted}'" if option else f"'{dotted}'" for dotted in near]
    return f"; did you mean {' or '.join(told)}?" if told else ""


def _keys_of_entry(dotted: str) -> str:
    """`; an entry of data.mix has ...` for a key inside a list of settings."""
    setting, bracket, _ = dotted.partition("[")
    section, _, name = setting.partition(".")
    fields = [getattr(entry, "model_fields", {}) for entry in get_args(settings_of(section).get(name))]
    return f"; an entry of {setting} has {', '.join(fields[0])}" if bracket and fields else ""


def booleans_for_numbers(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """pydantic reads `true` as 1 where a number is expected, and `yes` is `true` in YAML: both are mistakes here."""
    for section, values in settings.items():
        annotations = settings_of(section)
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and not {bool} & {annotations.get(name, bool), *get_args(annotations.get(name))}:
                yield f"{section}.{name}", f"got {str(value).lower()}, expected a value that is not true or false"


def describe(error: ValidationError) -> Iterator[tuple[str, str]]:
    """(dotted path, what is wrong) for each setting; the branches of a union are told as one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for detail in error.errors():
        found.setdefault(_dotted(detail["loc"]), []).append(dict(detail))
    for dotted, details in found.items():
        kind, first = details[0]["type"], details[0]
        if kind == "extra_forbidden":
            yield dotted, f"unknown {'key' if '.' in dotted else 'section'}{_keys_of_entry(dotted) or near_settings(dotted)}"
        elif kind == "value_error":  # a rule of the schema's own, which names the value itself
            yield dotted, str(first["ctx"]["error"])
        else:
            yield dotted, f"got {_shown(first['input'])}, expected {' or '.join(_expected(detail) for detail in details)}"


def _expected(detail: dict[str, Any]) -> str:
    match detail["type"]:
        case "string_type" | "path_type":
            return "text (in a file, put it in quotes)"
        case "list_type" | "tuple_type":
            return f"a list, for instance [{detail['input']}]"
        case "model_type" | "dict_type":
            return "settings below it, indented"
        case "missing":
            return "one value more" if isinstance(detail["loc"][-1], int) else f"a value for {detail['loc'][-1]}"
    head, _, _ = detail["msg"].removeprefix("Input should be ").partition(", unable to parse")
    return str(head)


def _shown(value: Any) -> str:  # noqa: ANN401 - YAML is any
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value.model_dump()) if isinstance(value, BaseModel) else repr(value)


def _dotted(location: tuple[int | str, ...]) -> str:
    """`("data", "mix", 0, "clips")` -> `data.mix[0].clips`; names of union branches, which follow no number, are left out."""
    told = ".".join(str(part) for part in location[:2])
    for before, part in pairwise(location[1:]):
        if isinstance(part, int):
            told += f"[{part}]"
        elif isinstance(before, int):
            told += f".{part}"
    return told

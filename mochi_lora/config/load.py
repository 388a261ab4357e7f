"""From a YAML file and dotted overrides to a `Config`: every problem at once, each with its dotted path. No torch here."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from mochi_lora.config.problems import (
    ConfigError,
    Problem,
    booleans_for_numbers,
    describe,
    near_settings,
    refuse,
    settings_of,
)
from mochi_lora.config.schema import Config

CONFIG_FOLDER = Path("configs")
COMMAND_LINE = "command line"


def find_config(name: str) -> Path:
    """`name` as given, else under configs/. Raises ConfigError with both paths tried and the names that come near."""
    tried = (Path(name), CONFIG_FOLDER / name)
    for path in tried:
        if path.is_file():
            return path
    there = sorted({path.name for folder in {tried[0].parent, CONFIG_FOLDER} for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(Path(name).name, there, n=3) or there
    hint = f"; there is {', '.join(near)}" if near else ""
    raise ConfigError(f"no configuration file {name!r}: tried {tried[0]} and {tried[1]}{hint}")


def load_config(path: Path | None, overrides: Sequence[str]) -> Config:
    """Defaults, changed by the YAML file at `path` (None: no file), changed by `overrides`.

    `overrides` reads `["--train.steps", "60"]` or `["--train.steps=60"]`; a later one wins. Values are YAML, except that
    a setting that is text takes what was typed. Raises ConfigError listing every problem of file and command line.
    """
    problems: list[Problem] = []
    settings = _read_yaml(path, problems) if path else {}
    origins: dict[str, str] = {}
    _apply(overrides, settings, origins, problems)
    file_name = str(path) if path else "defaults"
    problems += [Problem(dotted, text, origins.get(dotted, file_name)) for dotted, text in booleans_for_numbers(settings)]
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        named = {problem.path for problem in problems}
        described = [(dotted, text) for dotted, text in describe(error) if dotted not in named]
        problems += [Problem(dotted, text, _origin(dotted, origins, file_name)) for dotted, text in described]
        raise refuse(problems) from error
    if problems:
        raise refuse(problems)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read_yaml(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """The mapping in the file; an empty file and an empty section stand for defaults. Tags that make objects are refused."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        problems += [Problem(dotted, told, str(path)) for dotted, told in _repeated_keys(root, "", set())]
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.constructor.ConstructorError as error:
        # safe_load knows plain data only: `!!python/...` must never run code from a configuration file.
        raise ConfigError(f"{path}: {_place(error)}{error.problem}; plain YAML only, without tags") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: {_place(error)}not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got a {type(content).__name__}, expected sections such as 'train:' with settings below")
    return {str(key): {} if value is None and str(key) in Config.model_fields else value for key, value in content.items()}


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _repeated_keys(node: yaml.Node | None, above: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Keys written twice in one mapping: PyYAML would silently keep the last."""
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:  # an alias may point back at its own parent
        return
    seen.add(id(node))
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        dotted = f"{above}{key.value}"
        line = key.start_mark.line + 1
        if dotted in first_lines:
            yield dotted, f"written twice, in lines {first_lines[dotted]} and {line}; keep one"
        first_lines.setdefault(dotted, line)
        yield from _repeated_keys(value, f"{dotted}.", seen)


def _apply(overrides: Sequence[str], settings: dict[str, Any], origins: dict[str, str], problems: list[Problem]) -> None:
    """Put the overrides into `settings`, remembering in `origins` which paths the command line set."""
    for dotted, typed in _pairs(overrides, problems):
        section, _, name = dotted.partition(".")
        annotation = settings_of(section).get(name)
        if annotation is None:
            owner = "" if section in Config.model_fields else f"unknown section '{section}'"
            text = (owner or "unknown key") + near_settings(dotted)
            problems.append(Problem(dotted, text, COMMAND_LINE))
            continue
        target = settings.setdefault(section, {})
        if isinstance(target, dict):  # else the file's section is no mapping, which validation reports
            try:
                target[name] = _value(typed, annotation)
            except yaml.YAMLError:
                problems.append(Problem(dotted, f"got {typed!r}, which is not a YAML value", COMMAND_LINE))
                continue
            origins[dotted] = COMMAND_LINE


def _pairs(overrides: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """(dotted path, typed text) of each override."""
    words = iter(range(len(overrides)))
    for i in words:
        name, equals, typed = overrides[i].partition("=")
        dotted = name.removeprefix("--")
        if not name.startswith("--") or "." not in dotted:
            problems.append(Problem("", f"got {overrides[i]!r}, expected --section.key VALUE", COMMAND_LINE))
        elif equals:
            yield dotted, typed
        elif i + 1 == len(overrides) or overrides[i + 1].startswith("--"):
            problems.append(Problem(dotted, f"no value; write {name} VALUE, or {name}=VALUE", COMMAND_LINE))
        else:
            yield dotted, overrides[next(words)]


def _value(typed: str, annotation: Any) -> Any:  # noqa: ANN401 - YAML is any
    """What was typed, as YAML; as it stands where the setting is text, which YAML may read as a date, number or mapping."""
    options = get_args(annotation) if get_origin(annotation) is not Literal else ()
    text_wanted = annotation in (str, Path) or get_origin(annotation) is Literal or {str, Path} & set(options)
    if get_origin(annotation) is list or not text_wanted:
        return yaml.safe_load(typed)
    return None if type(None) in options and typed in ("null", "~") else typed


def _origin(dotted: str, origins: dict[str, str], file_name: str) -> str:
    """Where a setting, one of its items, or (for a rule between settings) any setting of a section came from."""
    setting = dotted.partition("[")[0]
    below = [COMMAND_LINE for path in origins if path.startswith(f"{setting}.")]
    if setting in origins:
        return COMMAND_LINE
    return f"{file_name}, {COMMAND_LINE}" if below else file_name

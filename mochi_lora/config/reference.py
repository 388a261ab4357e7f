"""The schema told to people and editors: an annotated YAML of every setting with its default, and a JSON schema."""

import textwrap
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from mochi_lora.config.schema import Config

_WIDTH = 118
_HEAD = """\
mochi-lora: every setting, with its default. Copy what you change into a file of your own; what a file leaves out
keeps its default. One file configures encode, train, sample and evaluate. On the command line: --section.key VALUE."""


def reference_yaml() -> str:
    """YAML that loads to `Config()`: above each setting its sentence and its legal values, as comments."""
    defaults = Config().model_dump(mode="json")
    lines = [f"# {line}" for line in _HEAD.splitlines()]
    for section, owner in Config.model_fields.items():
        model = owner.annotation
        assert model is not None
        lines += ["", *_comment(model.__doc__ or "", indent=""), f"{section}:"]
        for name, field in model.model_fields.items():
            lines += _comment(field.description or "", indent="  ", legal=legal_values(field))
            lines.append(f"  {name}: {_scalar(defaults[section][name])}")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def legal_values(field: FieldInfo) -> str:
    """`[...]` with the choices or the range of a setting; empty where its sentence says it all."""
    annotation: Any = field.annotation
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return f"[{' | '.join(map(str, get_args(annotation)))}]"
    if annotation is bool:
        return "[true | false]"
    bounds: list[str] = []
    for rule in field.metadata:
        match rule:
            case Ge(ge=limit):
                bounds.append(f">= {limit}")
            case Gt(gt=limit):
                bounds.append(f"> {limit}")
            case Le(le=limit):
                bounds.append(f"<= {limit}")
            case Lt(lt=limit):
                bounds.append(f"< {limit if limit != 2**63 else '2^63'}")
            case MinLen():
                bounds.append("not empty")
    return f"[{', '.join(bounds)}]" if bounds else ""


def _comment(text: str, *, indent: str, legal: str = "") -> list[str]:
    """`text` in comment lines, and `legal` behind it where it fits, else in a line of its own."""
    lines = textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    if legal and len(lines[-1]) + 1 + len(legal) <= _WIDTH:
        lines[-1] += f" {legal}"
    elif legal:
        lines.append(f"{indent}# {legal}")
    return lines


def _scalar(value: Any) -> str:  # noqa: ANN401 - YAML is any
    """One line of flow YAML; numbers in the short form that people write (0.0001, 1e-08)."""
    if isinstance(value, float):
        return repr(value)
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).removesuffix("\n...\n").strip()

"""What every page is made with: one set of template rules, and the one script that may run in an HTML page."""

import hashlib
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def page_environment(*, escaped: bool = True, **known: Any) -> Environment:  # noqa: ANN401 - whatever a template asks for
    """Templates in which a missing value is an error; `known` are the names they all may use.

    `escaped`: every value, for HTML. Markdown has other dangers, and filters of its own against them.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escaped,  # noqa: S701 - HTML is; Markdown would show the escapes
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(known)
    return environment


def own_script(name: str) -> dict[str, str]:
    """`script` and `script_hash` of a file in templates/: whatever a text smuggled in, only this script may run."""
    script = (TEMPLATES / name).read_text(encoding="utf-8")
    return {"script": script, "script_hash": b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")}

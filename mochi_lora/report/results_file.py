"""`results.json`: an `Evaluation` as strict JSON, and back exactly."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mochi_lora.errors import UserError
from mochi_lora.evaluation.results import Evaluation, file_name
from mochi_lora.files import write_text

NAME = "results.json"
FORMAT = "mochi-lora evaluation 2"  # 1 counted ties as half a win, and said of all measures at once whether they compare


def write_results(folder: Path, evaluation: Evaluation) -> Path:
    """Write `folder`/results.json (quick-results.json), atomically.

    NaN and infinities, which JSON lacks, become "NaN", "Infinity", "-Infinity".
    """
    path = folder / file_name(NAME, quick=evaluation.quick)
    content = {"format": FORMAT, **_strict(asdict(evaluation))}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_results(folder: Path, *, quick: bool = False) -> Evaluation:
    """Read `folder`/results.json, or that of the quick look, back, equal in every field to what was written.

    Raises UserError when the file is not there, is not JSON, is of another format, or lacks something.
    """
    path = folder / file_name(NAME, quick=quick)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder that `mochi-lora evaluate` wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); run the evaluation again, finished videos are kept") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format {found!r}, expected {FORMAT!r}; run the evaluation again with this version")
    try:
        return TypeAdapter(Evaluation).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']}; run the evaluation again, finished videos are kept") from error


def _strict(content: Any) -> Any:  # noqa: ANN401 - JSON is any
    """The same with numbers JSON cannot hold as the strings pydantic reads back as numbers."""
    match content:
        case dict():
            return {key: _strict(value) for key, value in content.items()}
        case list() | tuple():
            return [_strict(value) for value in content]
        case float() if not math.isfinite(content):
            return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    return content

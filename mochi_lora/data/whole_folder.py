"""Folders that are there whole or not at all, with a marker inside that says what they hold.

Written as a draft beside the place and renamed: the marker arrives with everything else.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mochi_lora.errors import UserError
from mochi_lora.files import out_of_space_named, write_json


def write_whole(folder: Path, *, marker: str, content: dict[str, Any], what: str, fill: Callable[[Path], None]) -> Path:
    """See that `folder` holds `what`: `fill(draft)` writes into a new folder, which gets the marker file and its name.

    A folder whose `marker` already says `content` is kept as it is. Any other non-empty folder raises UserError, and so does
    a file in its place. On failure nothing is left behind.
    """
    if _says(folder / marker, content):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not {what}; give a new folder, or delete this one")
    place = folder.resolve()  # `.` and `..` have no name to put a draft beside
    draft = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)  # of a dead process that had our number
    with out_of_space_named(folder):
        draft.mkdir(parents=True)
        try:
            fill(draft)
            write_json(draft / marker, content)
            draft.replace(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _says(marker: Path, content: dict[str, Any]) -> bool:
    try:
        return json.loads(marker.read_text(encoding="utf-8")) == content
    except (FileNotFoundError, NotADirectoryError, ValueError):  # not there, or nothing of ours
        return False

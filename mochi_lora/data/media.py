"""Which file names are media, by suffix. What a file really is, `data.probe` finds out from its content."""

import os
from pathlib import Path

_MP4, _MPEG = {".mp4", ".mov", ".m4v", ".3gp", ".3g2", ".f4v"}, {".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts"}
VIDEO_SUFFIXES = frozenset(_MP4 | _MPEG | {".mkv", ".webm", ".avi", ".gif", ".ogv", ".wmv", ".asf", ".flv", ".mxf"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES


def shown_name(path: Path) -> str | None:
    """How a path that is not UTF-8, which no table can hold, is shown: odd bytes in hexadecimal. None where it is UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    return None

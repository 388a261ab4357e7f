"""What a file holds and its SHA-256, found once: a thousand clips may be ranges of one long film. Safe among threads."""

from pathlib import Path
from threading import Lock

from mochi_lora.data.probe import ClipInfo, probe
from mochi_lora.errors import ClipError
from mochi_lora.files import sha256_of_file

_KEPT = 64  # files; the time stamps of a long film are a few MB


class KnownFile:
    """One file, looked into when first asked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._info: ClipInfo | ClipError | None = None
        self._sha256 = ""

    @property
    def info(self) -> ClipInfo:
        """As `probe`; what it refused is refused again without another look."""
        with self._lock:
            if self._info is None:
                try:
                    self._info = probe(self._path)
                except ClipError as error:
                    self._info = error.with_traceback(None)
            if isinstance(self._info, ClipError):
                raise ClipError(str(self._info))
            return self._info

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        with self._lock:
            self._sha256 = self._sha256 or sha256_of_file(self._path)
            return self._sha256


class KnownFiles:
    """The files seen last."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._files: dict[Path, KnownFile] = {}

    def __call__(self, path: Path) -> KnownFile:
        """The file at `path`, not yet looked into if it is new."""
        with self._lock:
            known = self._files.pop(path, None) or KnownFile(path)
            self._files[path] = known  # at the end: the first is the one not asked for the longest
            if len(self._files) > _KEPT:
                del self._files[next(iter(self._files))]
            return known

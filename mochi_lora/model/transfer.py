"""Bytes from the hub: files that go on where they were broken off, and parts of files that are not wanted whole.

Own transfers because huggingface_hub 2.4.0 begins a broken file again from its first byte: its temporary file has a name
of its own for each process (`file_download._download_to_tmp_and_move`). The requests are its, with its login, proxies and
waiting after 429 and 5xx.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import out_of_space_named, sync_to_disk

_CHUNK = 1 << 20
_ATTEMPTS = 5  # without a single byte in between
_PAUSE_SECONDS = 2.0
_SHA256_DIGITS = 64
# httpx.HTTPError or httpx2.HTTPError, whichever the installed hub client is built on.
NETWORK_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository, as the hub announces it."""

    path: str
    size: int
    digest: str  # SHA-256 of a large file, git's SHA-1 of a small one: what the hub calls its ETag


class Stopped(Exception):  # noqa: N818 - no error: somebody asked for it
    """The other transfers are given up as well."""


def fetch(url: str, file: RemoteFile, target: Path, tick: Callable[[int], object], stop: threading.Event) -> None:
    """`file` under `target`, which appears when size and checksum are right; `target`.incomplete keeps a part.

    `tick` is told the bytes as they come. Raises UserError where the connection breaks and does not come back,
    DamagedFileError where the content is not what was announced, Stopped once `stop` is set.
    """
    partial = partial_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    with out_of_space_named(target), partial.open("a+b") as stream:
        digest = _begin(file)
        stream.seek(0)
        while block := stream.read(_CHUNK):
            digest.update(block)
        for chunk in _received(url, file, stream.tell(), stop):
            stream.write(chunk)
            digest.update(chunk)
            tick(len(chunk))
        stream.flush()
        sync_to_disk(partial)
    if digest.hexdigest() != file.digest:
        partial.unlink()
        message = f"{file.path}: what came has another checksum than the hub announces ({file.digest[:12]}...)"
        raise DamagedFileError(f"{message}; it is deleted, run the command again")
    partial.replace(target)


def partial_of(target: Path) -> Path:
    """Where `fetch` keeps what has come of a file so far."""
    return target.with_name(f"{target.name}.incomplete")


def is_intact(path: Path, file: RemoteFile, tick: Callable[[int], object]) -> bool:
    """Whether the file on disk has the announced checksum; `tick` is told the bytes as they are read."""
    digest = _begin(file)
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
            tick(len(block))
    return digest.hexdigest() == file.digest


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (not included). Raises UserError where the server gives anything else."""
    with _named_errors(url), _opened(url, {"Range": f"bytes={start}-{end - 1}"}) as response:
        if response.status_code != 206:  # before the body is read: it may be 10 GB
            message = f"{url}: asked for bytes {start} to {end}, the server gave the whole file; expected HTTP range requests"
            raise UserError(f"{message}; use --precision fp32, or a hub without a proxy that strips them")
        content: bytes = response.read()
    if len(content) != end - start:
        raise UserError(f"{url}: {len(content)} bytes came where {end - start} were asked for; run the command again")
    return content


def read_whole(url: str, size: int) -> bytes:
    """A small file of `size` bytes, in memory. Raises UserError."""
    with _named_errors(url), _opened(url, {}) as response:
        content: bytes = response.read()
    if len(content) != size:
        raise UserError(f"{url}: {len(content)} bytes came where {size} were announced; run the command again")
    return content


def _begin(file: RemoteFile) -> Any:  # noqa: ANN401 - hashlib's objects have no public type
    if len(file.digest) == _SHA256_DIGITS:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)


def _received(url: str, file: RemoteFile, have: int, stop: threading.Event) -> Iterator[bytes]:
    """What is missing of a file from byte `have` on, over as many connections as it takes."""
    attempts = 0
    while have < file.size:
        try:
            for chunk in _one_connection(url, have):
                if stop.is_set():
                    raise Stopped
                attempts = 0
                have += len(chunk)
                if have > file.size:
                    raise UserError(f"{url}: more than the announced {file.size} bytes came; run the command again")
                yield chunk
            if have < file.size:
                raise ConnectionError("the connection was closed too early")
        except HfHubHTTPError as error:
            raise _told(url, error) from error
        except NETWORK_ERRORS as error:
            attempts += 1
            if attempts == _ATTEMPTS:
                message = f"{url}: the connection broke {attempts} times in a row ({error or type(error).__name__})"
                kept = f"{have} of {file.size} bytes are kept"
                raise UserError(f"{message}; {kept}, run the command again to fetch the rest") from error
            stop.wait(_PAUSE_SECONDS)


def _one_connection(url: str, have: int) -> Iterator[bytes]:
    with _opened(url, {"Range": f"bytes={have}-"} if have else {}) as response:
        surplus = have if response.status_code == 200 else 0  # a server that knows no ranges begins at the beginning
        for chunk in response.iter_bytes():  # as they come: with a size, what a broken line had brought of one is lost
            if surplus < len(chunk):
                yield chunk[surplus:]
            surplus = max(0, surplus - len(chunk))


@contextmanager
def _opened(url: str, headers: dict[str, str]) -> Iterator[Any]:
    asked = {**build_hf_headers(), **headers, "Accept-Encoding": "identity"}  # ranges count bytes of the file itself
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=asked, timeout=timeout, retry_on_exceptions=()) as response:
        hf_raise_for_status(response)
        yield response


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    try:
        yield
    except NETWORK_ERRORS as error:
        raise _told(url, error) from error


def _told(url: str, error: Exception) -> UserError:
    return UserError(f"{url}: {str(error).strip() or type(error).__name__}; check the network and the login, then run again")

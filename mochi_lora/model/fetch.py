"""A model from the hub onto this machine: what is missing, whether it fits, several files at once."""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from mochi_lora.console import progress_bar
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import DiskFullError, only_one
from mochi_lora.model.float32_tensors import read_float32, require_same_model, write_float32
from mochi_lora.model.layout import FLOAT32_TENSORS, missing
from mochi_lora.model.places import RECORD, Place, cache_of, cached_commit, in_cache, record, recorded, remember
from mochi_lora.model.remote import Repository, Wanted, choose, open_repository
from mochi_lora.model.transfer import RemoteFile, Stopped, fetch, is_intact, read_range
from mochi_lora.model.weights import open_weights

_AT_ONCE = 4
_SPARE_BYTES = 1 << 30  # left on the disk for everybody else
_MEGABYTE = 1e6


def cached_component(base: str, revision: str | None, component: str) -> Path:
    """Folder of one component in hugging face's cache, fetched (the transformer in bf16) where it is not complete.

    The commit is the one that was fetched last, the hub's newest only where nothing is there: a run goes on with the
    weights that it began with. Raises UserError.
    """
    commit = cached_commit(base, revision)
    if commit and not missing(folder := in_cache(base, commit).folder / component, component):
        return folder
    repository = open_repository(base, commit or revision)
    place = in_cache(base, repository.commit)
    with only_one(cache_of(base) / "snapshots", "downloading", wait=True):  # every process of a launch comes here
        if missing(place.folder / component, component):
            fetch_all(repository, choose(repository, (component,), "bf16", place), place)
            remember(base, repository.asked, repository.commit)
    return place.folder / component


def bytes_missing(wanted: Wanted, place: Place) -> int:
    """Bytes still to fetch of the files that are wanted whole."""
    return sum(file.size - place.received(file) for file in wanted.files)


def require_space(wanted: Wanted, place: Place) -> None:
    """Raises DiskFullError where the rest of the files does not fit on the disk."""
    needed, free = bytes_missing(wanted, place) + _SPARE_BYTES, place.free_bytes()
    if bytes_missing(wanted, place) and needed > free:
        message = f"{place.folder}: {needed / 1e9:.1f} GB are needed (1 GB of it to spare), {free / 1e9:.1f} GB are free"
        raise DiskFullError(f"{message}; free some space, or choose another disk: --to FOLDER, or HF_HOME for the cache")


def fetch_all(repository: Repository, wanted: Wanted, place: Place) -> int:
    """Fetch what is missing, with its progress; returns how many tensors were kept from rounding.

    Raises UserError; what came until then is kept, and fetching again goes on from there.
    """
    require_space(wanted, place)
    record(place, repository.base, repository.commit)
    folder = place.folder / "transformer"
    # First, so that a transformer that is complete is complete with them.
    if wanted.float32:
        _fetch_float32(repository, wanted.float32, folder)
    _fetch_files(repository, [file for file in wanted.files if not place.holds(file)], place)
    for file in wanted.files:
        place.show(file)
    if wanted.float32 and (folder / FLOAT32_TENSORS).is_file():
        return require_same_model(folder, [Path(name).name for name in wanted.rounded])
    return 0


def _fetch_float32(repository: Repository, paths: Iterable[str], folder: Path) -> None:
    """The tensors that bf16 would round, unless those of this very commit lie in `folder`: the hub has no checksum of them."""
    source = f"{repository.base}@{repository.commit}"
    if _float32_source(folder) == source:
        return
    tensors = {}
    for path in paths:
        url = repository.url(path)
        tensors.update(read_float32(lambda start, end, url=url: read_range(url, start, end), path))  # type: ignore[misc]
    if tensors:
        write_float32(folder, tensors, source)
    else:
        (folder / FLOAT32_TENSORS).unlink(missing_ok=True)  # another commit's


def _float32_source(folder: Path) -> str | None:
    if not (folder / FLOAT32_TENSORS).is_file():
        return None
    try:
        with open_weights(folder / FLOAT32_TENSORS) as file:
            return (file.metadata() or {}).get("source")
    except DamagedFileError:  # its advice is to download again, which is what happens here
        return None


def _fetch_files(repository: Repository, files: Iterable[RemoteFile], place: Place) -> None:
    """Several at once; the first error ends them all, and so does Ctrl-C."""
    contents = {place.content(file): file for file in files}  # in the cache two names may be one content
    if not contents:
        return
    stop = threading.Event()
    with progress_bar() as bar, ThreadPoolExecutor(_AT_ONCE) as pool:
        here = sum(map(place.received, contents.values())) / _MEGABYTE
        total = sum(file.size for file in contents.values()) / _MEGABYTE
        task = bar.add_task("fetching, MB", total=total)
        bar.advance(task, here)

        def tick(count: int) -> None:
            bar.update(task, advance=count / _MEGABYTE)

        running = [
            pool.submit(fetch, repository.url(file.path), file, content, tick, stop) for content, file in contents.items()
        ]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # noticed at the next megabyte
            pool.shutdown(cancel_futures=True)
    for future in running:
        if not future.cancelled() and (error := future.exception()) and not isinstance(error, Stopped):
            raise error


def is_recorded(folder: Path, repository: Repository) -> bool:
    """Whether a plain folder says that it is of this repository at this commit.

    Raises UserError where it is of another: files of the same size would be taken for the ones asked for.
    """
    found = recorded(folder)
    if found is None:
        return False
    base, commit = found
    if (base, commit) == (repository.base, repository.commit):
        return True
    message = f"{folder}: holds {base} @ {commit} ({RECORD} says so), asked for {repository.base} @ {repository.commit}"
    remedy = "choose another folder, or delete this one"
    if base == repository.base:
        remedy = f"choose another folder, delete this one, or go on with what it holds: --model.revision {commit}"
    raise UserError(f"{message}; {remedy}")


def require_own(found: Sequence[RemoteFile], repository: Repository, folder: Path) -> None:
    """Raises UserError where files of a plain folder without a record have other bytes than this commit's.

    They are not fetched over unasked: they may be somebody's fine-tune, the only copy.
    """
    if not found:
        return
    message = f"{folder}: holds other files than {repository.base} @ {repository.commit}: {len(found)}, the first is"
    told = f"{message} {found[0].path}; no {RECORD} says what they are of"
    raise UserError(f"{told}; choose another folder, delete this one, or add --verify to have these files deleted and fetched")


def differing(files: Iterable[RemoteFile], place: Place) -> list[RemoteFile]:
    """Those of the files that are here with other bytes than the hub announces."""
    here = [file for file in files if place.content(file).is_file()]
    with progress_bar() as bar:
        task = bar.add_task("checking, MB", total=sum(file.size for file in here if place.holds(file)) / _MEGABYTE)

        def tick(count: int) -> None:
            bar.update(task, advance=count / _MEGABYTE)

        return [file for file in here if not (place.holds(file) and is_intact(place.content(file), file, tick))]

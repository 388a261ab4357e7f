"""A model from the hub onto this machine: what is missing, whether it fits, several files at once."""

import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from mochi_lora.console import progress_bar
from mochi_lora.files import DiskFullError, only_one
from mochi_lora.model.float32_tensors import read_float32, require_same_model, write_float32
from mochi_lora.model.layout import FLOAT32_TENSORS, missing
from mochi_lora.model.places import Place, cache_of, cached_commit, in_cache, remember
from mochi_lora.model.remote import Repository, Wanted, choose, open_repository
from mochi_lora.model.transfer import RemoteFile, Stopped, fetch, is_intact, read_range

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
    folder = place.folder / "transformer"
    # First, so that a transformer that is complete is complete with them.
    if wanted.float32 and not (folder / FLOAT32_TENSORS).is_file():
        tensors = {}
        for path in wanted.float32:
            url = repository.url(path)
            tensors.update(read_float32(lambda start, end, url=url: read_range(url, start, end), path))  # type: ignore[misc]
        if tensors:
            write_float32(folder, tensors, f"{repository.base}@{repository.commit}")
    _fetch_files(repository, [file for file in wanted.files if not place.holds(file)], place)
    for file in wanted.files:
        place.show(file)
    if wanted.float32 and (folder / FLOAT32_TENSORS).is_file():
        return require_same_model(folder, [Path(name).name for name in wanted.rounded])
    return 0


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


def damaged(wanted: Wanted, place: Place) -> list[RemoteFile]:
    """The files here whose checksum is wrong; they are deleted, so that fetching brings them again."""
    here = [file for file in wanted.files if place.holds(file)]
    wrong = []
    with progress_bar() as bar:
        task = bar.add_task("checking, MB", total=sum(file.size for file in here) / _MEGABYTE)
        for file in here:
            if not is_intact(place.content(file), file, lambda count: bar.update(task, advance=count / _MEGABYTE)):
                place.content(file).unlink()
                wrong.append(file)
    return wrong

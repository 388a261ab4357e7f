"""`mochi-lora download`: the base model onto this machine, only the files that are needed."""

from collections.abc import Iterable
from pathlib import Path

from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table
from mochi_lora.errors import UserError
from mochi_lora.files import only_one
from mochi_lora.model.base import require_hub_id
from mochi_lora.model.fetch import bytes_missing, differing, fetch_all, is_recorded, require_own
from mochi_lora.model.layout import COMPONENTS, Variant
from mochi_lora.model.places import Place, in_cache, remember
from mochi_lora.model.remote import Repository, Wanted, choose, open_repository
from mochi_lora.model.transfer import RemoteFile

_GIGABYTE = 1e9
_OF_A_MODEL = (*COMPONENTS, "model_index.json")


def run(config: Config, *, precision: Variant, folder: Path | None, verify: bool) -> None:
    """Fetch `model.base` at `model.revision` into hugging face's cache, or into `folder`. Run again to continue.

    `verify` reads everything that is here already and compares its checksum. Raises UserError, also for a `folder` that
    holds another model or commit.
    """
    base = config.model.base
    if Path(base).is_dir():
        raise UserError(f"model.base: {base} is a folder on this machine; there is nothing to download")
    require_hub_id(base)
    repository = open_repository(base, config.model.revision)
    place = Place(folder) if folder else in_cache(base, repository.commit)
    with only_one(folder or place.folder.parent, "downloading"):
        checked = folder is not None and not is_recorded(folder, repository)
        if checked:  # before the choice, which depends on what is here
            _check_unrecorded(repository, place, verify=verify)
        wanted = choose(repository, COMPONENTS, precision, place)
        _print_files(repository, wanted, place)
        if verify and not checked:
            _delete(differing(wanted.files, place), place)
        exact = fetch_all(repository, wanted, place)
        if folder is None:
            remember(base, repository.asked, repository.commit)
    _tell(wanted, place, exact)


def _check_unrecorded(repository: Repository, place: Place, *, verify: bool) -> None:
    """What lies in a plain folder that does not say what it is of, such as an older download, compared by checksum."""
    # All of it, not only what is wanted: a loader takes the float32 transformer where a whole one lies beside the bf16 one.
    files = [file for path, file in repository.files.items() if path.partition("/")[0] in _OF_A_MODEL]
    if any(place.content(file).is_file() for file in files):
        line = f"{place.folder} does not say which commit it is of: its files are checked once, by checksum"
        console.print(f"checking {line}", markup=False)
    found = differing(files, place)
    if not verify:
        require_own(found, repository, place.folder)
    _delete(found, place)


def _delete(found: Iterable[RemoteFile], place: Place) -> None:
    for file in found:
        place.content(file).unlink(missing_ok=True)  # in the cache two names may be one content
        console.print(f"damaged  {file.path}: deleted, it is fetched again", style="yellow", markup=False)


def _print_files(repository: Repository, wanted: Wanted, place: Place) -> None:
    rows = []
    for file in wanted.files:
        here = place.received(file)
        share = "there" if place.holds(file) else f"{here / file.size:.0%} there" if here else "to fetch"
        rows.append((file.path, _size(file.size), share))
    if wanted.float32:
        rows.append((f"{len(wanted.float32)} float32 files of the transformer", "their header", "the tensors bf16 would round"))
    rows.append(("all", _size(sum(file.size for file in wanted.files)), f"{_size(bytes_missing(wanted, place))} to fetch"))
    print_table(f"{repository.base} @ {repository.commit[:12]}", ("file", "size", ""), rows)
    console.print(f"into     {place.folder} ({place.free_bytes() / _GIGABYTE:.1f} GB free)", markup=False)


def _size(count: int) -> str:
    for unit, size in (("GB", _GIGABYTE), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _tell(wanted: Wanted, place: Place, exact: int) -> None:
    if exact:
        console.print(f"exact    {exact} tensors of the transformer kept from rounding: float32 beside its bf16 files")
    elif wanted.float32:
        console.print("exact    the hub's float32 files hold no tensor in float32 that bf16 would round", style="yellow")
    console.print(f"model    {place.folder}", markup=False)
    setting = "" if place.blobs else f" --model.base {place.folder}"
    console.print(f"next     mochi-lora encode --config <your file>{setting}", markup=False)

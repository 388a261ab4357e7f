"""A model repository on the hub, and the files of it that are needed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

from mochi_lora import spec
from mochi_lora.errors import UserError
from mochi_lora.model.layout import Variant, Weights, find_weights, has_weights, small_files
from mochi_lora.model.places import Place
from mochi_lora.model.transfer import NETWORK_ERRORS, RemoteFile, read_whole

_PIPELINE = "model_index.json"
_NO_ANSWER: tuple[type[Exception], ...] = (*NETWORK_ERRORS, HFValidationError, OSError)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Repository:
    """What the hub says of a model at one commit."""

    base: str
    asked: str  # branch, tag or commit
    commit: str
    files: Mapping[str, RemoteFile]

    def url(self, path: str) -> str:
        """Where the file is fetched from."""
        return f"{constants.ENDPOINT}/{self.base}/resolve/{self.commit}/{quote(path)}"

    def text(self, path: str) -> str:
        """A small file's content. Raises UserError."""
        return read_whole(self.url(path), self.files[path].size).decode()


def open_repository(base: str, revision: str | None) -> Repository:
    """The repository `base` at `revision` (None: its main branch). Raises UserError."""
    asked = revision or constants.DEFAULT_REVISION
    try:
        found = HfApi(endpoint=constants.ENDPOINT).model_info(base, revision=asked, files_metadata=True)
    except RevisionNotFoundError as error:
        message = f"model.revision: {base} on the hub has no branch, tag or commit {asked!r}; null takes its newest"
        raise UserError(message) from error
    except _NO_ANSWER as error:
        message = f"model.base: there is no local folder {base}, and the hub has not given such a model ({error})"
        raise UserError(f"{message}; check the path, or the name and the network") from error
    files = {}
    for item in found.siblings or []:
        digest = (item.lfs.sha256 if item.lfs else item.blob_id) or ""
        path = PurePosixPath(item.rfilename)
        if item.size is None or not _DIGEST.fullmatch(digest) or ".." in path.parts or path.is_absolute():
            message = f"model.base: the hub announces {item.rfilename} of {base} with size {item.size} and checksum {digest!r}"
            raise UserError(f"{message}; expected a path inside the repository, a size, and a SHA-1 or SHA-256")
        files[item.rfilename] = RemoteFile(item.rfilename, item.size, digest)
    assert found.sha, "model_info of one revision names its commit"
    return Repository(base, asked, found.sha, files)


@dataclass(frozen=True)
class Wanted:
    """What to fetch of a repository."""

    files: tuple[RemoteFile, ...]
    # The float32 transformer, of which only the tensors that the bf16 one must not round are fetched, and the latter.
    float32: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()


def choose(repository: Repository, components: Sequence[str], precision: Variant, place: Place) -> Wanted:
    """The files of these components, one set of weights each: float32, for the transformer in bf16 if asked for and there.

    Where `place` holds the float32 transformer already, that is the one wanted. Raises UserError for a component, or a
    file that an index names, that the repository does not have.
    """
    files = [repository.files[_PIPELINE]] if _PIPELINE in repository.files else []
    float32: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    for component in components:
        weights = _weights(repository, component, "fp32") if has_weights(component) else None
        if component == "transformer" and (small := _small_transformer(repository, weights, precision, place)):
            float32, rounded = weights.files if weights else (), small.files
            weights = small
        files += _files(repository, component, weights)
    return Wanted(tuple(files), *(tuple(f"transformer/{name}" for name in names) for names in (float32, rounded)))


def _small_transformer(repository: Repository, full: Weights | None, precision: Variant, place: Place) -> Weights | None:
    """The bf16 variant, or None where the float32 one is to be used."""
    if precision == "bf16" and not (full and _is_here(repository, full, place)):
        return _weights(repository, "transformer", "bf16")
    if full is None and _weights(repository, "transformer", "bf16"):
        message = f"model.base: {repository.base} on the hub has the transformer in bf16 only; use --precision bf16"
        raise UserError(message)
    return None


def _is_here(repository: Repository, weights: Weights, place: Place) -> bool:
    files = [repository.files.get(f"transformer/{name}") for name in weights.files]
    return all(file is not None and place.holds(file) for file in files)


def _weights(repository: Repository, component: str, variant: Variant) -> Weights | None:
    return find_weights(
        component,
        variant,
        f"{repository.base}/{component}",
        lambda name: f"{component}/{name}" in repository.files,
        lambda name: repository.text(f"{component}/{name}"),
    )


def _files(repository: Repository, component: str, weights: Weights | None) -> list[RemoteFile]:
    inside = [path.removeprefix(f"{component}/") for path in repository.files if path.startswith(f"{component}/")]
    if not inside or (weights is None and has_weights(component)):
        message = f"model.base: {repository.base} on the hub has no {component}; expected a diffusers layout such as"
        raise UserError(f"{message} {spec.BASE_MODEL}")
    names = small_files(component, inside)
    if weights is not None:
        names += [*([weights.index] if weights.index else []), *weights.files]
    if absent := sorted(set(names) - set(inside)):
        message = f"model.base: {repository.base} on the hub lacks {component}/{absent[0]}, which its index names"
        raise UserError(f"{message}; choose another model.revision")
    return [repository.files[f"{component}/{name}"] for name in names]

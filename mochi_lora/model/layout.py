"""The files that make up a pretrained model in diffusers layout, on the hub or on a disk.

The published repository (genmo/mochi-1-preview @14be5fc) holds 133 GB, a third of which is needed: Genmo's own format
beside diffusers', the transformer in float32 and in bf16, and a second copy of T5 that no index names.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mochi_lora.errors import DamagedFileError

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
# What a bf16 transformer rounds and Mochi keeps in float32; `mochi-lora download` writes it beside the shards.
FLOAT32_TENSORS = "float32_tensors.safetensors"
Variant = Literal["bf16", "fp32"]  # fp32 is the set without a variant in its names
VARIANTS: tuple[Variant, ...] = ("fp32", "bf16")  # the better first

_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_CONFIGS = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
_VOCABULARIES = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True)
class Weights:
    """One complete set of a component's weights, by file name."""

    index: str | None  # None where one file holds everything
    files: tuple[str, ...]


def find_weights(
    component: str, variant: Variant, place: str, has: Callable[[str], bool], read: Callable[[str], str]
) -> Weights | None:
    """The weights of `component`, None where nothing announces them.

    `has` answers for a file name inside the component's folder, called `place` in messages, and `read` gives the text of
    one that is there. That the files an index names are there as well is not checked. Raises DamagedFileError.
    """
    stem = _STEMS[component]
    # diffusers 0.42.1 writes the first form of a variant's index, and so is the published one named; others wrote the second.
    marked = (f"{stem}.safetensors.index.bf16.json", f"{stem}.bf16.safetensors.index.json")
    indices = marked if variant == "bf16" else (f"{stem}.safetensors.index.json",)
    single = f"{stem}.bf16.safetensors" if variant == "bf16" else f"{stem}.safetensors"
    for index in indices:
        if has(index):
            return Weights(index, tuple(sorted(set(_weight_map(read(index), f"{place}/{index}").values()))))
    return Weights(None, (single,)) if has(single) else None


def _weight_map(text: str, name: str) -> dict[str, str]:
    try:
        places = json.loads(text)["weight_map"]
        if all(isinstance(file, str) and file == Path(file).name for file in places.values()):
            return dict(places)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DamagedFileError(f"{name}: not a readable index with a weight_map; download it again")


def has_weights(component: str) -> bool:
    """Whether the component is a network."""
    return component in _STEMS


def small_files(component: str, names: list[str]) -> list[str]:
    """Of the file names in a component's folder those that are neither weights nor an index of weights."""
    if component in _STEMS:
        return [name for name in names if name == "config.json"]
    return [name for name in names if name.endswith((".json", ".model"))]


def missing(folder: Path, component: str) -> list[str]:
    """Names of the files that a component's folder lacks; empty where it is complete.

    Raises DamagedFileError for an unreadable index.
    """
    config = _CONFIGS.get(component, "config.json")
    lacking = [] if (folder / config).is_file() else [config]
    if component in _STEMS:
        return lacking + _missing_weights(folder, component)
    if component == "tokenizer" and not any((folder / name).is_file() for name in _VOCABULARIES):
        lacking.append(" or ".join(_VOCABULARIES))
    return lacking


def _missing_weights(folder: Path, component: str) -> list[str]:
    """Of the variant that comes nearest to being complete; only the transformer's loader knows variants."""
    variants = VARIANTS if component == "transformer" else VARIANTS[:1]
    announced = [found for variant in variants if (found := local_weights(folder, component, variant))]
    lacking = [[name for name in found.files if not (folder / name).is_file()] for found in announced]
    return min(lacking, key=len, default=[f"{_STEMS[component]}.safetensors"])


def local_weights(folder: Path, component: str, variant: Variant) -> Weights | None:
    """As `find_weights`, of a folder on disk."""
    return find_weights(
        component,
        variant,
        str(folder),
        lambda name: (folder / name).is_file(),
        lambda name: (folder / name).read_text(encoding="utf-8"),
    )

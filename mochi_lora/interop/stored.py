"""Tensors on disk as a list to walk through: each is read when it is needed, and files are written as they are walked.

The published transformer is 20 GB in bf16 and 40 GB in float32; nothing here holds more than one tensor of it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import write_atomic
from mochi_lora.interop.factors import listed
from mochi_lora.model import keymap
from mochi_lora.model.weights import exact_tensors, open_weights, read_config, stored_precision, weight_files

# Names of safetensors' own header.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {torch.int8: "I8"}  # codes are written here, never read


Tick = Callable[[], object]  # called after each tensor, for a progress bar


def nothing() -> None:
    """No progress to show."""


@dataclass(frozen=True)
class Stored:
    """One tensor that is read, or computed, when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def tensors_in(path: Path) -> dict[str, Stored]:
    """Every tensor of one safetensors file under its own name. Raises UserError for what is no floating point number."""
    found = {}
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise UserError(f"{path}: {name} is stored as {part.get_dtype()}; expected one of {', '.join(_DTYPES)}")
            found[name] = Stored(tuple(part.get_shape()), _DTYPES[part.get_dtype()], _reader(path, name))
    return found


def _reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with open_weights(path) as file:
            return file.get_tensor(name)

    return read


def tensors_of_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a diffusers component folder, in one file or in shards.

    Raises UserError for a folder of quantised weights: codes are nothing to add to, to compare or to convert.
    """
    if (folder / "config.json").is_file() and (precision := stored_precision(read_config(folder))):
        message = f"{folder}: its weights are quantised ({precision})"
        raise UserError(f"{message}; give the folder or the file that they were made from")
    files = weight_files(folder)
    exact = exact_tensors(files)  # last: of a name stored twice this is the one that is not rounded
    return {name: tensor for path in [*files, *([exact] if exact else [])] for name, tensor in tensors_in(path).items()}


def transformer_tensors(source: Path) -> dict[str, Stored]:
    """A transformer under diffusers' names: of a `transformer` folder, of a model folder with one, or of Genmo's file.

    Raises UserError where `source` is none of these.
    """
    if source.is_dir():
        return tensors_of_folder(component_folder(source, "transformer"))
    if not source.is_file():
        raise UserError(f"{source}: neither a transformer folder in diffusers' layout nor a file in Genmo's")
    tensors = tensors_in(source)
    if not keymap.is_genmo(list(tensors)):
        raise UserError(f"{source}: not a transformer in Genmo's format; expected tensors like blocks.0.attn.qkv_x.weight")
    depth, found = keymap.depth_of(list(tensors)), {}
    for name, tensor in tensors.items():
        known = name == "pos_frequencies" or name.endswith((".weight", ".bias"))
        try:
            parts = keymap.weights_to_diffusers(name, torch.empty(tensor.shape, device="meta"), depth) if known else {}
        except (KeyError, ValueError):  # unknown, or not to be cut in three
            parts = {}
        if not parts:
            raise UserError(f"{source}: tensor {name} is not part of Genmo's transformer")
        for target, part in parts.items():
            found[target] = Stored(tuple(part.shape), tensor.dtype, _part_reader(name, tensor, target, depth))
    return found


def _part_reader(name: str, tensor: Stored, target: str, depth: int) -> Callable[[], torch.Tensor]:
    return lambda: keymap.weights_to_diffusers(name, tensor.read(), depth)[target]


def component_folder(folder: Path, component: str) -> Path:
    """`folder` itself, or the folder `component` inside where it is a whole model."""
    return folder / component if (folder / component).is_dir() else folder


def write_tensors(path: Path, tensors: Mapping[str, Stored], tick: Tick = nothing) -> None:
    """One safetensors file, atomically, each tensor read as it is written: 8 bytes of length, a JSON header, the bytes.

    Written here because the library's writer wants all tensors at once. Wide dtypes come first, as the library has it, so
    that every tensor is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                value, expected = tensors[name].read(), tensors[name]
                assert (tuple(value.shape), value.dtype) == (expected.shape, expected.dtype), f"{name} is not as announced"
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                tick()

    write_atomic(path, write)


def require_same(source: Mapping[str, Stored], written: Mapping[str, Stored], path: Path, tick: Tick = nothing) -> None:
    """Raises DamagedFileError unless both hold the same tensors, bit for bit."""
    if odd := sorted(source.keys() ^ written.keys()):
        raise DamagedFileError(f"{path}: {len(odd)} tensors do not read back as what was converted:\n{listed(odd)}")
    for name, tensor in written.items():
        if tensor.dtype != source[name].dtype or not torch.equal(tensor.read(), source[name].read()):
            raise DamagedFileError(f"{path}: {name} does not read back as what was converted; is the disk sound?")
        tick()

"""The few tensors that Mochi keeps in float32 and its bf16 variant rounds: 193 of them, 120 kB of a 40 GB checkpoint.

They are read out of the float32 files on the hub by HTTP ranges: a safetensors file begins with the length of a JSON
header (8 bytes, little-endian) and the header, which says where each tensor's bytes lie behind it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mochi_lora.engine.precision import is_kept_float32
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import write_atomic
from mochi_lora.model.layout import FLOAT32_TENSORS
from mochi_lora.model.weights import open_weights

_LARGEST_HEADER = 100_000_000  # as in safetensors itself
_GAP = 1 << 16  # bytes worth reading over rather than asking once more: a block's four norms lie side by side
_BF16_STEP = 2.0**-7  # relative; a bf16 number lies within half of it when rounded, within all of it when cut off

Read = Callable[[int, int], bytes]  # bytes from a to b of one file


@dataclass(frozen=True)
class _Part:
    name: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_float32(read: Read, source: str) -> dict[str, torch.Tensor]:
    """Of one safetensors file the tensors that must stay float32 and are stored so. Raises DamagedFileError."""
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= _LARGEST_HEADER:
        raise DamagedFileError(f"{source}: does not begin like a safetensors file; choose another model.revision")
    parts = _wanted_parts(read(8, 8 + length), 8 + length, source)
    tensors = {}
    for group in _neighbours(parts):
        start = group[0].start
        content = read(start, group[-1].end)
        for part in group:
            values = torch.frombuffer(bytearray(content[part.start - start : part.end - start]), dtype=torch.float32)
            tensors[part.name] = values.view(part.shape)
    return tensors


def _wanted_parts(header: bytes, offset: int, source: str) -> list[_Part]:
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if is_kept_float32(name)}
        parts = [
            _Part(name, tuple(entry["shape"]), *(offset + place for place in entry["data_offsets"]))
            for name, entry in entries.items()
            if entry["dtype"] == "F32"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{source}: its safetensors header is not readable; choose another model.revision") from error
    if odd := [part.name for part in parts if part.end - part.start != 4 * torch.Size(part.shape).numel()]:
        raise DamagedFileError(f"{source}: {odd[0]} has another size than its shape says; choose another model.revision")
    return sorted(parts, key=lambda part: part.start)


def _neighbours(parts: Sequence[_Part]) -> list[list[_Part]]:
    groups: list[list[_Part]] = []
    for part in parts:
        if groups and part.start - groups[-1][-1].end <= _GAP:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def write_float32(folder: Path, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Put them where `load_transformer` finds them, beside the bf16 shards in `folder`."""
    path = folder / FLOAT32_TENSORS
    write_atomic(path, lambda temporary: save_file(tensors, temporary, {"format": "pt", "source": source}))


def require_same_model(folder: Path, shards: Sequence[str]) -> int:
    """Check that the shards hold the float32 tensors of `folder` rounded to bf16; returns how many tensors these are.

    Raises UserError, and deletes the float32 tensors, where the shards are of another model.
    """
    path = folder / FLOAT32_TENSORS
    with open_weights(path) as file:
        exact = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for shard in shards:
        with open_weights(folder / shard) as file:
            for name in set(file.keys()) & set(exact):
                if not _is_rounded(file.get_tensor(name), exact[name]):
                    path.unlink()
                    message = f"{folder}: {name} in bf16 is not what the float32 checkpoint has, rounded"
                    raise UserError(f"{message}; they are two models, use --precision fp32")
    return len(exact)


def _is_rounded(rounded: torch.Tensor, exact: torch.Tensor) -> bool:
    return rounded.shape == exact.shape and bool(((rounded.float() - exact).abs() <= exact.abs() * _BF16_STEP).all())

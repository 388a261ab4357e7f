"""How golden tensors are stored and read: `NAME.safetensors.xz`, its format in golden/README.md.

`plain_golden` gives the safetensors file that was packed, byte for byte; code that takes a path is handed that file
(fixture `genmo_base`). To make a packed file anew: `write_golden(Path("made.safetensors"))`.
"""

import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load

FOLDER = Path(__file__).parent / "golden"
_LENGTH = 8  # bytes in front of a safetensors header that say how long it is


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a packed golden file, and its header's metadata."""
    plain = plain_golden(name)
    return load(plain), _header(plain).get("__metadata__", {})


def plain_golden(name: str) -> bytes:
    return unpacked((FOLDER / f"{name}.safetensors.xz").read_bytes())


def write_golden(plain: Path) -> None:
    (FOLDER / f"{plain.name}.xz").write_bytes(packed(plain.read_bytes()))


def packed(plain: bytes) -> bytes:
    """A safetensors file, every tensor's bytes put apart by their place in an element, then compressed.

    Of random floats only sign and exponent can be compressed, and only where the mantissa is out of the way.
    """
    return lzma.compress(_each_tensor(plain, _apart), preset=9)


def unpacked(content: bytes) -> bytes:
    return _each_tensor(lzma.decompress(content), _together)


def _header(content: bytes) -> dict:
    return json.loads(content[_LENGTH : _data_start(content)])


def _data_start(content: bytes) -> int:
    return _LENGTH + int.from_bytes(content[:_LENGTH], "little")


def _each_tensor(content: bytes, change: Callable[[bytes, int], bytes]) -> bytes:
    start, changed = _data_start(content), bytearray(content)
    tensors = {name: entry for name, entry in _header(content).items() if name != "__metadata__"}
    for entry in tensors.values():
        first, last = (start + offset for offset in entry["data_offsets"])
        if elements := math.prod(entry["shape"]):
            changed[first:last] = change(content[first:last], (last - first) // elements)
    return bytes(changed)


def _apart(elements: bytes, width: int) -> bytes:
    return b"".join(elements[place::width] for place in range(width))


def _together(planes: bytes, width: int) -> bytes:
    elements, count = bytearray(len(planes)), len(planes) // width
    for place in range(width):
        elements[place::width] = planes[place * count : (place + 1) * count]
    return bytes(elements)

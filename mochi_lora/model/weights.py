"""Transformer weights from disk, tensor by tensor: diffusers' folder layout or Genmo's single file.

Own loader for three reasons: Genmo keeps `pos_frequencies` and the q/k norms in float32 (genmoai/mochi#115) while
`from_pretrained(dtype=bf16)` rounds them; the stored precision of those tensors has to be known; and each tensor is cast
on its way to the device, so that the 40 GB float32 checkpoint never stands whole in host memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import MochiTransformer3DModel
from safetensors import SafetensorError, safe_open

from mochi_lora.engine.precision import Precision, is_kept_float32, weight_dtype
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.model import keymap

_WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class LoadedTransformer:
    """A frozen transformer and what is known of its source."""

    transformer: MochiTransformer3DModel
    rounded: tuple[str, ...]  # tensors that should be float32 but were stored rounded


def load_transformer(source: Path, *, device: torch.device, precision: Precision) -> LoadedTransformer:
    """The frozen transformer from a diffusers `transformer` folder, or from a file in Genmo's format.

    Raises UserError for a missing or unknown tensor, naming it (a LoRA file given as a base ends here too).
    """
    files = [source] if source.is_file() else weight_files(source)
    shapes = {name: shape for path in files for name, shape in _shapes(path)}
    genmo = keymap.is_genmo(list(shapes))
    if source.is_dir():
        config = read_config(source)
    elif genmo:
        config = genmo_config(source, shapes)
    else:
        message = f"{source}: not a transformer in Genmo's format; expected tensors like blocks.0.attn.qkv_x.weight"
        raise UserError(message)
    with init_empty_weights():
        transformer = MochiTransformer3DModel.from_config(config)
    rounded = _fill(
        transformer, _tensors(files, len(transformer.transformer_blocks) if genmo else None), device, precision, source
    )
    transformer.requires_grad_(False)  # noqa: FBT003 - torch's signature
    transformer.eval()
    return LoadedTransformer(transformer, tuple(rounded))


def random_transformer(
    config: dict[str, Any], *, device: torch.device, precision: Precision, seed: int = 0
) -> MochiTransformer3DModel:
    """A frozen transformer with random weights drawn on `device`, for benchmarks: no host copy of 10 B parameters.

    Linears get variance 1/fan_in, gates thereby |tanh| well above zero, so that no path through a block is dead.
    """
    with init_empty_weights():
        transformer = MochiTransformer3DModel.from_config(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(transformer.named_parameters()):
        value = torch.empty(parameter.shape, device=device, dtype=weight_dtype(name, precision))
        if parameter.ndim == 1:
            value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            value.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        set_module_tensor_to_device(transformer, name, device, value=value, dtype=value.dtype)
    transformer.requires_grad_(False)  # noqa: FBT003 - torch's signature
    return transformer.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Arguments of the transformer in a diffusers `transformer` folder. Raises UserError where none can be read."""
    try:
        return MochiTransformer3DModel.load_config(folder)
    except OSError as error:
        message = f"{folder}: no readable config.json; is the download complete?"
        raise UserError(message) from error


def genmo_config(source: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of the transformer whose tensors have these `shapes` under Genmo's names. Raises UserError."""
    try:
        return keymap.config_of(shapes)
    except KeyError as error:
        message = f"{source}: tensor {error} is missing; this is no whole transformer (a LoRA file given as a base?)"
        raise UserError(message) from error


def weight_files(folder: Path) -> list[Path]:
    """The float32 shards where they exist, else those of the bf16 variant."""
    for stem in (f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.bf16.safetensors"):
        index = folder / f"{stem}.index.json"
        if index.exists():
            return [folder / name for name in _shards(index)]
        if (folder / stem).exists():
            return [folder / stem]
    message = f"{folder}: no {_WEIGHTS}.safetensors and no {_WEIGHTS}.safetensors.index.json; is the download complete?"
    raise UserError(message)


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError) as error:
        message = f"{index}: not a readable index with a weight_map; download it again"
        raise DamagedFileError(message) from error


def open_weights(path: Path) -> Any:  # noqa: ANN401 - safe_open has no public type
    """One weights file, tensors to be asked for by name. Raises UserError where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        message = f"{path}: named by the index but not there; is the download complete?"
        raise UserError(message) from error
    except SafetensorError as error:
        message = f"{path}: not a readable safetensors file ({error}); download it again"
        raise DamagedFileError(message) from error


def _shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with open_weights(path) as weights:
        for name in weights.keys():  # noqa: SIM118 - not a dict
            yield name, tuple(weights.get_slice(name).get_shape())


def _tensors(files: list[Path], genmo_depth: int | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(diffusers name, tensor) one by one; Genmo's names are translated when a depth is given."""
    for path in files:
        with open_weights(path) as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                tensor = weights.get_tensor(name)
                if genmo_depth is None:
                    yield name, tensor
                    continue
                try:
                    yield from keymap.weights_to_diffusers(name, tensor, genmo_depth).items()
                except KeyError as error:
                    message = f"{path}: tensor {name} is not part of Genmo's transformer"
                    raise UserError(message) from error


def _fill(
    transformer: MochiTransformer3DModel,
    tensors: Iterator[tuple[str, torch.Tensor]],
    device: torch.device,
    precision: Precision,
    source: Path,
) -> list[str]:
    """Put every tensor in place; returns the names of float32-only tensors that were stored rounded."""
    expected = {name: parameter.shape for name, parameter in transformer.named_parameters()}
    rounded = []
    for name, tensor in tensors:
        if name not in expected:
            message = f"{source}: tensor {name} is not part of this transformer (extra, or given twice)"
            raise UserError(message)
        if tensor.shape != expected[name]:
            message = f"{source}: {name} has shape {tuple(tensor.shape)}, its config.json expects {tuple(expected[name])}"
            raise UserError(message)
        del expected[name]
        dtype = weight_dtype(name, precision)
        if is_kept_float32(name) and tensor.dtype != torch.float32:
            rounded.append(name)
        set_module_tensor_to_device(transformer, name, device, value=tensor, dtype=dtype)
    if expected:
        names = ", ".join(sorted(expected)[:3])
        message = f"{source}: {len(expected)} tensors are missing ({names}, ...); this is no whole transformer"
        raise UserError(message)
    return rounded

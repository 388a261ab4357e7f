"""Transformer weights from disk, tensor by tensor: diffusers' folder layout or Genmo's single file.

Own loader for three reasons: Genmo keeps `pos_frequencies` and the q/k norms in float32 (genmoai/mochi#115) while
`from_pretrained(dtype=bf16)` rounds them; the stored precision of those tensors has to be known; and each tensor is cast
or quantised on its way to the device, so that the 40 GB float32 checkpoint never stands whole in host memory, nor a bf16
copy of it on a GPU that is to hold fp8.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import init_empty_weights
from diffusers import MochiTransformer3DModel
from safetensors import SafetensorError, safe_open

from mochi_lora.engine.precision import (
    Precision,
    is_kept_float32,
    place_code,
    place_tensor,
    quantise_linears,
    require_precision,
    weight_dtype,
)
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.model import keymap
from mochi_lora.model.layout import FLOAT32_TENSORS, VARIANTS, local_weights

_WEIGHTS = "diffusion_pytorch_model"
# In config.json of a folder that `mochi-lora convert base --to fp8` wrote. Stock diffusers refuses a method it does not know.
QUANTISED = "quantization_config"
QUANT_METHOD = "mochi_lora"

Home = Callable[[str], torch.device]  # where the base tensor of a name is to live


@dataclass(frozen=True)
class LoadedTransformer:
    """A frozen transformer and what is known of its source."""

    transformer: MochiTransformer3DModel
    rounded: tuple[str, ...]  # tensors that should be float32 but were stored rounded


def load_transformer(
    source: Path, *, device: torch.device, precision: Precision, home: Home | None = None
) -> LoadedTransformer:
    """The frozen transformer from a diffusers `transformer` folder, quantised or not, or from a file in Genmo's format.

    With `home`, tensors go where it says for their name, and `device` only rounds those that are quantised. Raises UserError
    for a missing or unknown tensor, naming it (a LoRA file given as a base ends here too), and for a precision that `device`
    cannot run, or that the folder was not written for.
    """
    require_precision(precision, device)
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
    depth = len(transformer.transformer_blocks) if genmo else None
    tensors = _tensors(files, depth, exact_tensors(files))
    encoded = _is_encoded(source, config, precision)
    expected = _parameter_shapes(transformer)
    quantise_linears(transformer, precision)

    def place(name: str, tensor: torch.Tensor) -> None:
        place_on = home(name) if home else device
        if encoded:
            place_code(transformer, name, tensor, precision, place_on)
        else:
            place_tensor(transformer, name, tensor, device, precision, place_on)

    rounded = _fill(_parameter_shapes(transformer) if encoded else expected, tensors, place, source)
    transformer.requires_grad_(False)  # noqa: FBT003 - torch's signature
    transformer.eval()
    return LoadedTransformer(transformer, tuple(rounded))


def random_transformer(
    config: dict[str, Any], *, device: torch.device, precision: Precision, seed: int = 0, home: Home | None = None
) -> MochiTransformer3DModel:
    """A frozen transformer with random weights drawn on `device`, for benchmarks: no host copy of 10 B parameters.

    Linears get variance 1/fan_in, gates thereby |tanh| well above zero, so that no path through a block is dead. One seed
    draws one model at every precision but fp32; `home` is as in `load_transformer`.
    """
    require_precision(precision, device)
    with init_empty_weights():
        transformer = MochiTransformer3DModel.from_config(config)
    generator = torch.Generator(device).manual_seed(seed)
    parameters = list(transformer.named_parameters())
    quantise_linears(transformer, precision)
    for name, parameter in parameters:
        value = torch.empty(parameter.shape, device=device, dtype=weight_dtype(name, precision))
        if parameter.ndim == 1:
            value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            value.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        place_tensor(transformer, name, value, device, precision, home(name) if home else device)
    transformer.requires_grad_(False)  # noqa: FBT003 - torch's signature
    return transformer.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Arguments of the transformer in a diffusers `transformer` folder. Raises UserError where none can be read."""
    try:
        return MochiTransformer3DModel.load_config(folder)
    except OSError as error:
        inside = folder / "transformer"
        whole = inside.is_dir() and not (folder / "config.json").exists()
        remedy = f"it is a whole model: give {inside} or {folder / 'vae'}" if whole else "is the download complete?"
        raise UserError(f"{folder}: no readable config.json; {remedy}") from error


def stored_precision(config: dict[str, Any]) -> str | None:
    """The precision a transformer folder was quantised for, by its configuration; None for plain weights."""
    quantised = config.get(QUANTISED) or {}
    if not quantised:
        return None
    return str(quantised.get("precision") if quantised.get("quant_method") == QUANT_METHOD else quantised.get("quant_method"))


def _is_encoded(source: Path, config: dict[str, Any], precision: Precision) -> bool:
    stored = stored_precision(config)
    if stored in (None, precision):
        return stored is not None
    change = f"set engine.precision: {stored}" if stored in get_args(Precision) else "mochi-lora cannot read that form"
    message = f"{source}: its weights are quantised ({stored}), but engine.precision is {precision}; {change}"
    raise UserError(f"{message}, or give the weights that they were made from")


def _parameter_shapes(transformer: MochiTransformer3DModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in transformer.named_parameters()}


def genmo_config(source: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of the transformer whose tensors have these `shapes` under Genmo's names. Raises UserError."""
    try:
        return keymap.config_of(shapes)
    except KeyError as error:
        message = f"{source}: tensor {error} is missing; this is no whole transformer (a LoRA file given as a base?)"
        raise UserError(message) from error


def weight_files(folder: Path) -> list[Path]:
    """The float32 shards where all are there, else those of the bf16 variant. Raises UserError where there are neither."""
    announced = [found for variant in VARIANTS if (found := local_weights(folder, "transformer", variant))]
    if not announced:
        message = f"{folder}: no {_WEIGHTS}.safetensors and no {_WEIGHTS}.safetensors.index.json; is the download complete?"
        raise UserError(message)
    whole = [found for found in announced if all((folder / name).is_file() for name in found.files)]
    return [folder / name for name in (whole or announced)[0].files]


def exact_tensors(files: list[Path]) -> Path | None:
    """The file with the float32 tensors that these files of `weight_files` hold rounded, if `mochi-lora download` put one."""
    path = files[0].with_name(FLOAT32_TENSORS)
    return path if ".bf16" in files[0].name and path.is_file() else None


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


def _tensors(files: list[Path], genmo_depth: int | None, exact: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(diffusers name, tensor) one by one; Genmo's names are translated when a depth is given, `exact` goes before `files`."""
    kept = _all_of(exact) if exact else {}
    for path in files:
        with open_weights(path) as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                tensor = kept.pop(name) if name in kept else weights.get_tensor(name)
                if genmo_depth is None:
                    yield name, tensor
                    continue
                try:
                    yield from keymap.weights_to_diffusers(name, tensor, genmo_depth).items()
                except KeyError as error:
                    message = f"{path}: tensor {name} is not part of Genmo's transformer"
                    raise UserError(message) from error
    if kept:
        message = f"{exact}: tensor {min(kept)} is not part of this transformer; delete the file and download it again"
        raise UserError(message)


def _all_of(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - not a dict


def _fill(
    expected: dict[str, torch.Size],
    tensors: Iterator[tuple[str, torch.Tensor]],
    place: Callable[[str, torch.Tensor], None],
    source: Path,
) -> list[str]:
    """Place every tensor, once it is known to belong; returns the names of float32-only tensors that were stored rounded."""
    rounded = []
    for name, tensor in tensors:
        if name not in expected:
            message = f"{source}: tensor {name} is not part of this transformer (extra, or given twice)"
            raise UserError(message)
        if tensor.shape != expected[name]:
            message = f"{source}: {name} has shape {tuple(tensor.shape)}, its config.json expects {tuple(expected[name])}"
            raise UserError(message)
        del expected[name]
        if is_kept_float32(name) and tensor.dtype != torch.float32:
            rounded.append(name)
        place(name, tensor)
    if expected:
        names = ", ".join(sorted(expected)[:3])
        message = f"{source}: {len(expected)} tensors are missing ({names}, ...); this is no whole transformer"
        raise UserError(message)
    return rounded

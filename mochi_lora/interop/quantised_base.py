"""A transformer folder written quantised, as `load_transformer` reads it at the same precision without rounding again."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from mochi_lora.engine.precision import Precision, format_of, is_kept_float32
from mochi_lora.engine.quantised import QuantisedLinear
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import write_text
from mochi_lora.interop.base_formats import Converted, empty_model, require_whole
from mochi_lora.interop.base_merge import WEIGHTS, require_new
from mochi_lora.interop.stored import Stored, Tick, component_folder, nothing, tensors_in, transformer_tensors, write_tensors
from mochi_lora.model.weights import QUANT_METHOD, QUANTISED, genmo_config, open_weights, read_config

_FP8: Precision = "fp8"


def to_fp8(source: Path, target: Path, tick: Tick = nothing) -> Converted:
    """The transformer `source` (diffusers' folder, a model folder with one, or Genmo's file) as the new folder `target`.

    About half the size of bf16: a byte per weight of the blocks' linears, the rest bf16, Genmo's float32 tensors as they are
    stored. One tensor is in memory at a time. Raises UserError for anything that is not a whole transformer.
    """
    require_new(target)
    stored = transformer_tensors(source)
    if source.is_dir():
        config = read_config(component_folder(source, "transformer"))
    else:
        config = genmo_config(source, {name: tensor.shape for name, tensor in tensors_in(source).items()})
    if config.get("_class_name", "MochiTransformer3DModel") != "MochiTransformer3DModel":
        raise UserError(f"{source}: is a {config['_class_name']}; only the transformer has an fp8 form")
    require_whole("transformer", source, stored, config)
    encoded: dict[str, Stored] = {}
    for name, tensor in stored.items():
        encoded |= _encoded(name, tensor)
    write_tensors(target / WEIGHTS, encoded, tick)
    _require_same(encoded, target / WEIGHTS, tick)
    written = json.loads(empty_model("transformer", config).to_json_string())
    written[QUANTISED] = {"quant_method": QUANT_METHOD, "precision": _FP8}
    write_text(target / "config.json", json.dumps(written, indent=2) + "\n")  # last, as in `base_formats`
    return Converted("transformer", (target,), len(encoded), written)


def _encoded(name: str, tensor: Stored) -> dict[str, Stored]:
    """What stands for one tensor, read and rounded anew for each of its parts."""
    module, _, leaf = name.rpartition(".")
    chosen = format_of(module, _FP8) if leaf == "weight" else None
    if chosen is None:
        dtype = tensor.dtype if is_kept_float32(name) else torch.bfloat16
        return {name: Stored(tensor.shape, dtype, lambda: tensor.read().to(dtype))}
    rows, columns = tensor.shape
    linear = chosen(columns, rows, bias=False)
    return {
        f"{module}.{part}": Stored(shape, dtype, _part_reader(linear, tensor, part))
        for part, (shape, dtype) in linear.spec().items()
    }


def _part_reader(linear: QuantisedLinear, tensor: Stored, part: str) -> Callable[[], torch.Tensor]:
    return lambda: linear.encode(tensor.read())[part]


def _require_same(written: dict[str, Stored], path: Path, tick: Tick) -> None:
    with open_weights(path) as file:
        for name, tensor in written.items():
            found, expected = file.get_tensor(name), tensor.read()
            # As bytes: fp8 has no comparison.
            if found.dtype != expected.dtype or not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
                raise DamagedFileError(f"{path}: {name} does not read back as what was written; is the disk sound?")
            tick()

"""The base model between Genmo's files and diffusers' folders, both ways, one tensor in memory at a time.

Genmo: `dit.safetensors`, `encoder.safetensors`, `decoder.safetensors`. diffusers: a `transformer` and a `vae` folder, each
with config.json. Numbers are moved, never rounded: what is written is read again and compared bit for bit.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

from mochi_lora.errors import UserError
from mochi_lora.files import write_text
from mochi_lora.interop import vae_names
from mochi_lora.interop.base_merge import WEIGHTS, require_new
from mochi_lora.interop.factors import listed
from mochi_lora.interop.stored import (
    Stored,
    Tick,
    nothing,
    require_same,
    tensors_in,
    tensors_of_folder,
    transformer_tensors,
    write_tensors,
)
from mochi_lora.model import keymap
from mochi_lora.model.weights import genmo_config, read_config

_MODELS = {"transformer": MochiTransformer3DModel, "vae": AutoencoderKLMochi}
_LATENT_CHANNELS = 12
# Of a VAE's configuration what stands in Genmo's code and in none of its files; the rest is read off the tensors.
_IN_GENMOS_CODE = ("latents_mean", "latents_std", "scaling_factor", "act_fn")


@dataclass(frozen=True)
class Converted:
    """What was written where."""

    component: str  # transformer or vae
    paths: tuple[Path, ...]
    tensors: int
    config: dict[str, Any]


def to_diffusers(sources: Sequence[Path], target: Path, tick: Tick = nothing) -> Converted:
    """Genmo's transformer file, or the VAE's encoder and decoder together, as the diffusers folder `target`.

    Depth and widths are read off the tensors. Raises UserError for anything else, naming the tensors that do not belong.
    """
    require_new(target)
    kinds = {_kind(path): path for path in sources}
    if list(kinds) == ["transformer"] and len(sources) == 1:
        stored = tensors_in(sources[0])
        config = genmo_config(sources[0], {name: tensor.shape for name, tensor in stored.items()})
        return _write_folder("transformer", transformer_tensors(sources[0]), config, target, tick)
    if set(kinds) == {"encoder", "decoder"} and len(sources) == len(kinds):
        tensors, config = _vae_tensors(kinds["encoder"], kinds["decoder"])
        return _write_folder("vae", tensors, config, target, tick)
    told = ", ".join(f"{path} ({_kind(path)})" for path in sources)
    message = f"expected Genmo's transformer alone, or the VAE's encoder and decoder together; got {told}"
    raise UserError(f"{message}; a diffusers vae folder needs both halves")


def to_genmo(source: Path, target: Path, tick: Tick = nothing) -> Converted:
    """A diffusers `transformer` folder as Genmo's file `target`, or a `vae` folder as the folder `target` with two files.

    A `target` without .safetensors is a folder in either case. Raises UserError for another kind of folder, and for a VAE
    with other statistics than Mochi-1's.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected the transformer or vae folder of a Mochi in diffusers layout")
    config = read_config(source)
    component = next((name for name, model in _MODELS.items() if model.__name__ == config.get("_class_name")), None)
    if component is None:
        expected = " or ".join(model.__name__ for model in _MODELS.values())
        raise UserError(f"{source / 'config.json'}: is a {config.get('_class_name')}, expected {expected}")
    stored = tensors_of_folder(source)
    require_whole(component, source, stored, config)
    if component == "transformer":
        path = target if target.suffix == ".safetensors" else target / "dit.safetensors"
        _write_new(path, _genmo_transformer(stored, config["num_layers"]), tick)
        require_same(stored, transformer_tensors(path), path, tick)
        return Converted(component, (path,), len(stored), config)
    _require_mochis_statistics(source, config)
    halves = _genmo_vae(stored, vae_names.blocks_of_config(config))
    paths = tuple(target / f"{half}.safetensors" for half in halves)
    for path, tensors in zip(paths, halves.values(), strict=True):
        _write_new(path, tensors, tick)
    require_same(stored, _vae_tensors(*paths)[0], target, tick)
    return Converted(component, paths, len(stored), config)


def _kind(path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected one of Genmo's dit.safetensors, encoder.safetensors, decoder.safetensors"
        )
    names = tensors_in(path).keys()
    if "pos_frequencies" in names or "x_embedder.proj.weight" in names:
        return "transformer"
    if "blocks.0.0.weight" in names:
        return "decoder"
    if "layers.0.weight" in names:
        return "encoder"
    raise UserError(f"{path}: none of Genmo's three files; it holds {listed(sorted(names)[:3]).strip()}, ...")


def _write_new(path: Path, tensors: Mapping[str, Stored], tick: Tick) -> None:
    if path.exists():
        raise UserError(f"{path}: exists; give a new path, or delete it")
    write_tensors(path, tensors, tick)


def _write_folder(component: str, tensors: dict[str, Stored], config: dict[str, Any], target: Path, tick: Tick) -> Converted:
    require_whole(component, target, tensors, config)
    write_tensors(target / WEIGHTS, tensors, tick)
    require_same(tensors, tensors_of_folder(target), target, tick)
    # Last: a folder without config.json is one whose conversion was cut short.
    write_text(target / "config.json", empty_model(component, config).to_json_string())
    return Converted(component, (target,), len(tensors), config)


def empty_model(component: str, config: dict[str, Any]) -> MochiTransformer3DModel | AutoencoderKLMochi:
    """The component on the meta device: names and shapes, no weights."""
    with init_empty_weights():
        return _MODELS[component].from_config(config)


def require_whole(component: str, place: Path, tensors: Mapping[str, Stored], config: dict[str, Any]) -> None:
    """Raises UserError, naming them, where tensors are missing, unknown or of another shape than `config` asks for."""
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(component, config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if odd := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        message = f"{place}: {len(odd)} tensors are missing, unknown or of another shape than the rest asks for"
        raise UserError(f"{message}:\n{listed(odd)}\nthis is no whole Mochi {component}")


def _require_mochis_statistics(source: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError, naming the fields, for a VAE's configuration that Genmo's two files would lose without a word."""
    defaults = {name: inspect.signature(AutoencoderKLMochi).parameters[name].default for name in _IN_GENMOS_CODE}
    if lost := [name for name, default in defaults.items() if _plain(config.get(name, default)) != _plain(default)]:
        message = f"{source / 'config.json'}: {', '.join(lost)} {'is' if len(lost) == 1 else 'are'} not Mochi-1's"
        remedy = "keep this VAE in diffusers' layout, or set Mochi-1's values if the weights were trained with them"
        raise UserError(f"{message}; Genmo's files cannot hold {'it' if len(lost) == 1 else 'them'}, {remedy}")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value  # JSON has lists where diffusers' defaults are tuples


def _genmo_transformer(stored: Mapping[str, Stored], depth: int) -> dict[str, Stored]:
    """Genmo's names, each tensor joined from its parts when it is read."""
    found = {}
    for name, tensor in stored.items():
        if name == "pos_frequencies":
            found[name] = tensor
            continue
        module, _, parameter = name.rpartition(".")
        home = keymap.module_of(module)
        rows = keymap.rows_of(home, depth)
        if module == rows.names[0]:
            found[f"{home}.{parameter}"] = _joined([stored[f"{part}.{parameter}"] for part in rows.names], rows)
    return found


def _joined(parts: list[Stored], rows: keymap.Rows) -> Stored:
    height = sum(part.shape[0] for part in parts)
    return Stored((height, *parts[0].shape[1:]), parts[0].dtype, lambda: rows.join([part.read() for part in parts]))


def _genmo_vae(stored: Mapping[str, Stored], blocks: vae_names.Blocks) -> dict[str, dict[str, Stored]]:
    halves: dict[str, dict[str, Stored]] = {"encoder": {}, "decoder": {}}
    for module, names in vae_names.module_names(blocks).items():
        half, _, inside = module.partition(".")
        for parameter in ("weight", "bias"):
            if parts := [stored[f"{name}.{parameter}"] for name in names if f"{name}.{parameter}" in stored]:
                halves[half][f"{inside}.{parameter}"] = _joined(parts, keymap.Rows(names))
    return halves


def _vae_tensors(encoder: Path, decoder: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(tensors under diffusers' names, config) of Genmo's two files."""
    stored = {f"encoder.{name}": tensor for name, tensor in tensors_in(encoder).items()}
    stored |= {f"decoder.{name}": tensor for name, tensor in tensors_in(decoder).items()}
    source = f"{encoder}, {decoder}"
    blocks = vae_names.blocks_of_genmo(list(stored), source)
    names, found, unknown = vae_names.module_names(blocks), {}, []
    for name, tensor in stored.items():
        module, _, parameter = name.rpartition(".")
        if module not in names:
            unknown.append(name)
            continue
        parts = vae_names.cut(torch.empty(tensor.shape, device="meta"), names[module])
        for target, part in parts.items():
            found[f"{target}.{parameter}"] = _cut(tensor, names[module], target, tuple(part.shape))
    if unknown:
        raise UserError(f"{source}: {len(unknown)} tensors are not of a Mochi VAE:\n{listed(sorted(unknown))}")
    try:
        config = vae_names.config_of({name: tensor.shape for name, tensor in stored.items()}, blocks)
    except KeyError as error:
        raise UserError(f"{source}: tensor {error} is missing; this is no whole VAE") from error
    if config["latent_channels"] != _LATENT_CHANNELS:
        message = f"{source}: {config['latent_channels']} latent channels; the statistics of the latents are known for 12 only"
        raise UserError(message)
    return found, config


def _cut(tensor: Stored, names: tuple[str, ...], target: str, shape: tuple[int, ...]) -> Stored:
    return Stored(shape, tensor.dtype, lambda: vae_names.cut(tensor.read(), names)[target])

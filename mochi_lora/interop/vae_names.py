"""One map between Genmo's and diffusers' names for the VAE, for any number of blocks; sizes are read off the tensors.

Source: genmoai/mochi @0c86aeb `vae/models.py` (`Encoder`, `Decoder`) and diffusers 0.42.1 `autoencoder_kl_mochi.py`. Genmo
numbers the layers of a sequence, diffusers names them. Two files there, one here: keys carry `encoder.` and `decoder.`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mochi_lora.errors import UserError

_STACK = {"0": "norm1.norm_layer", "2": "conv1.conv", "3": "norm2.norm_layer", "5": "conv2.conv"}
_QKV = "attn_block.attn.qkv"


@dataclass(frozen=True)
class Blocks:
    """Residual layers, and whether they attend over time: entry, one per down-sampling, exit. The decoder mirrors them."""

    layers: tuple[int, ...]
    attention: tuple[bool, ...]


def blocks_of_config(config: Mapping[str, Any]) -> Blocks:
    """The structure of a diffusers `vae` folder."""
    return Blocks(tuple(config["layers_per_block"]), tuple(config["add_attention_block"]))


def module_names(blocks: Blocks) -> dict[str, tuple[str, ...]]:
    """Genmo's module -> diffusers' module, or three of them for a fused qkv."""
    return {**dict(_encoder(blocks)), **dict(_decoder(blocks))}


def _encoder(blocks: Blocks) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "encoder.layers.0", ("encoder.proj_in",)
    entry, *downs, last = blocks.layers
    for layer in range(entry):
        yield from _residual(f"encoder.layers.{layer + 1}", "encoder.block_in", layer, attends=blocks.attention[0])
    for down, layers in enumerate(downs):
        theirs, ours = f"encoder.layers.{entry + 1 + down}.layers", f"encoder.down_blocks.{down}"
        yield f"{theirs}.0", (f"{ours}.conv_in.conv",)
        for layer in range(layers):
            yield from _residual(f"{theirs}.{layer + 1}", ours, layer, attends=blocks.attention[down + 1])
    for layer in range(last):
        number = entry + 1 + len(downs) + layer
        yield from _residual(f"encoder.layers.{number}", "encoder.block_out", layer, attends=blocks.attention[-1])
    yield "encoder.output_norm", ("encoder.norm_out.norm_layer",)
    yield "encoder.output_proj", ("encoder.proj_out",)


def _decoder(blocks: Blocks) -> Iterator[tuple[str, tuple[str, ...]]]:
    entry, *ups, last = reversed(blocks.layers)
    yield "decoder.blocks.0.0", ("decoder.conv_in",)
    for layer in range(entry):
        yield from _residual(f"decoder.blocks.0.{layer + 1}", "decoder.block_in", layer, attends=False)
    for up, layers in enumerate(ups):
        theirs, ours = f"decoder.blocks.{up + 1}", f"decoder.up_blocks.{up}"
        for layer in range(layers):
            yield from _residual(f"{theirs}.blocks.{layer}", ours, layer, attends=False)
        yield f"{theirs}.proj", (f"{ours}.proj",)
    for layer in range(last):
        yield from _residual(f"decoder.blocks.{len(ups) + 1}.{layer}", "decoder.block_out", layer, attends=False)
    yield "decoder.output_proj", ("decoder.proj_out",)


def _residual(theirs: str, ours: str, layer: int, *, attends: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, name in _STACK.items():
        yield f"{theirs}.stack.{number}", (f"{ours}.resnets.{layer}.{name}",)
    if attends:
        attention = f"{ours}.attentions.{layer}"
        yield f"{theirs}.{_QKV}", tuple(f"{attention}.to_{part}" for part in "qkv")
        yield f"{theirs}.attn_block.attn.out", (f"{attention}.to_out.0",)
        yield f"{theirs}.attn_block.norm", (f"{ours}.norms.{layer}.norm_layer",)


def blocks_of_genmo(names: list[str], source: str) -> Blocks:
    """The structure that Genmo's tensor names tell, keys with `encoder.` and `decoder.`. Raises UserError for another one.

    diffusers has one list of layers for both halves; a decoder of another depth than its encoder has no folder.
    """
    downs = _numbers(names, r"encoder\.layers\.(\d+)\.layers\.\d+\.stack\.0\.weight")
    layers = _numbers(names, r"encoder\.layers\.(\d+)\.stack\.0\.weight")
    if not downs or not layers:
        raise UserError(f"{source}: not the encoder of Genmo's VAE; expected tensors like layers.4.layers.0.weight")
    first, last = min(downs), max(downs)
    inside = [
        len(_numbers(names, rf"encoder\.layers\.{number}\.layers\.(\d+)\.stack\.0\.weight"))
        for number in range(first, last + 1)
    ]
    counts = (len({n for n in layers if n < first}), *inside, len({n for n in layers if n > last}))
    spans = [(1, first), *((number, number + 1) for number in range(first, last + 1)), (last + 1, max(layers) + 1)]
    attending = _numbers(names, rf"encoder\.layers\.(\d+)\.(?:layers\.\d+\.)?{re.escape(_QKV)}\.weight")
    attention = tuple(any(start <= number < stop for number in attending) for start, stop in spans)
    return Blocks(counts, attention)


def _numbers(names: list[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.fullmatch(pattern, name))}


def config_of(shapes: Mapping[str, tuple[int, ...]], blocks: Blocks) -> dict[str, Any]:
    """`AutoencoderKLMochi` arguments, read off the shapes of Genmo's tensors. KeyError names a tensor that is missing.

    The statistics of the latents stand in no file of Genmo's but in its code; diffusers' defaults are the same numbers.
    """
    first = blocks.layers[0] + 1
    downs = [shapes[f"encoder.layers.{first + number}.layers.0.weight"] for number in range(len(blocks.layers) - 2)]
    ups = [shapes[f"decoder.blocks.{number + 1}.proj.weight"] for number in range(len(blocks.layers) - 2)]
    return {
        "in_channels": shapes["encoder.layers.0.weight"][1],
        "out_channels": shapes["decoder.output_proj.weight"][0],
        "encoder_block_out_channels": (shapes["encoder.layers.0.weight"][0], *(shape[0] for shape in downs)),
        "decoder_block_out_channels": (shapes["decoder.output_proj.weight"][1], *(shape[1] for shape in reversed(ups))),
        "latent_channels": shapes["decoder.blocks.0.0.weight"][1],
        "layers_per_block": blocks.layers,
        "temporal_expansions": tuple(shape[2] for shape in downs),
        "spatial_expansions": tuple(shape[3] for shape in downs),
        "add_attention_block": blocks.attention,
    }


def cut(tensor: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """One tensor of Genmo's under diffusers' module name or names: a fused qkv is cut by rows."""
    return dict(zip(names, tensor.chunk(len(names), dim=0), strict=True))

"""One map between Genmo's and diffusers' names for the transformer, for weights and for LoRA factors.

Source: diffusers 0.42.1 `scripts/convert_mochi_to_diffusers.py` and genmoai/mochi @0c86aeb `asymm_models_joint.py`. Two
traps are checked by the golden tests: Genmo's SwiGLU is silu(first) * second and diffusers' first * silu(second), so the
halves of `w1` swap; and the final modulation is (shift, scale) against (scale, shift).
"""

import re
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rows:
    """How the output rows of one Genmo linear become those of the diffusers linears in `names`."""

    names: tuple[str, ...]
    swap_halves: bool = False

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cut (or swap) along dim 0, the output features of weights, biases and LoRA B factors."""
        if self.swap_halves:
            first, second = tensor.chunk(2, dim=0)
            return {self.names[0]: torch.cat([second, first], dim=0)}
        return dict(zip(self.names, tensor.chunk(len(self.names), dim=0), strict=True))

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The way back: diffusers' rows, in the order of `names`, as Genmo's."""
        joined = torch.cat(parts, dim=0) if len(parts) > 1 else parts[0]
        return torch.cat(joined.chunk(2, dim=0)[::-1], dim=0) if self.swap_halves else joined


_OUTSIDE = {
    "x_embedder.proj": Rows(("patch_embed.proj",)),
    "t_embedder.mlp.0": Rows(("time_embed.timestep_embedder.linear_1",)),
    "t_embedder.mlp.2": Rows(("time_embed.timestep_embedder.linear_2",)),
    "t5_y_embedder.to_kv": Rows(("time_embed.pooler.to_kv",)),
    "t5_y_embedder.to_q": Rows(("time_embed.pooler.to_q",)),
    "t5_y_embedder.to_out": Rows(("time_embed.pooler.to_out",)),
    "t5_yproj": Rows(("time_embed.caption_proj",)),
    "final_layer.mod": Rows(("norm_out.linear",), swap_halves=True),
    "final_layer.linear": Rows(("proj_out",)),
}
_INSIDE = {
    "mod_x": Rows(("norm1.linear",)),
    "attn.qkv_x": Rows(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    "attn.qkv_y": Rows(("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj")),
    "attn.q_norm_x": Rows(("attn1.norm_q",)),
    "attn.k_norm_x": Rows(("attn1.norm_k",)),
    "attn.q_norm_y": Rows(("attn1.norm_added_q",)),
    "attn.k_norm_y": Rows(("attn1.norm_added_k",)),
    "attn.proj_x": Rows(("attn1.to_out.0",)),
    "attn.proj_y": Rows(("attn1.to_add_out",)),
    "mlp_x.w1": Rows(("ff.net.0.proj",), swap_halves=True),
    "mlp_x.w2": Rows(("ff.net.2",)),
    "mlp_y.w1": Rows(("ff_context.net.0.proj",), swap_halves=True),
    "mlp_y.w2": Rows(("ff_context.net.2",)),
}


def is_genmo(keys: list[str]) -> bool:
    """Whether these tensor names are Genmo's."""
    return any(key.startswith("blocks.") or key in ("x_embedder.proj.weight", "pos_frequencies.weight") for key in keys)


def rows_of(module: str, depth: int) -> Rows:
    """The diffusers linears of Genmo's `module` (`blocks.3.attn.qkv_x`); `depth` = number of blocks. KeyError if unknown."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if match is None:
        return _OUTSIDE[module]
    index, inside = int(match[1]), match[2]
    last = index == depth - 1
    # The last block only scales its text stream: another class, another name.
    rows = Rows(("norm1_context.linear_1" if last else "norm1_context.linear",)) if inside == "mod_y" else _INSIDE[inside]
    return Rows(tuple(f"transformer_blocks.{index}.{name}" for name in rows.names), rows.swap_halves)


def module_of(name: str) -> str:
    """Genmo's module that holds the diffusers module `name` (`transformer_blocks.3.attn1.to_k`). KeyError if there is none."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
    table, wanted, prefix = (_OUTSIDE, name, "") if match is None else (_INSIDE, match[2], f"blocks.{match[1]}.")
    if match and wanted in ("norm1_context.linear", "norm1_context.linear_1"):
        return f"{prefix}mod_y"
    for module, rows in table.items():
        if wanted in rows.names:
            return f"{prefix}{module}"
    raise KeyError(name)


def depth_of(keys: list[str]) -> int:
    """Number of blocks named in Genmo's tensor names."""
    return 1 + max(int(match[1]) for key in keys if (match := re.match(r"blocks\.(\d+)\.", key)))


def weights_to_diffusers(name: str, tensor: torch.Tensor, depth: int) -> dict[str, torch.Tensor]:
    """One Genmo tensor under its diffusers name or names. KeyError for a name that is not Genmo's."""
    if name == "pos_frequencies":
        return {name: tensor}
    module, _, parameter = name.rpartition(".")
    return {f"{target}.{parameter}": part for target, part in rows_of(module, depth).split(tensor).items()}


def lora_to_diffusers(module: str, factor_a: torch.Tensor, factor_b: torch.Tensor, depth: int) -> dict[str, tuple[Any, Any]]:
    """(A [r, in], B [out, r]) of one Genmo module -> (A, B) per diffusers module: A is shared, B is cut by rows."""
    return {target: (factor_a, part) for target, part in rows_of(module, depth).split(factor_b).items()}


def config_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """`MochiTransformer3DModel` arguments, read off the shapes of Genmo's tensors (any depth and width)."""
    heads, half_head = shapes["pos_frequencies"][1:]
    return {
        "patch_size": shapes["x_embedder.proj.weight"][-1],
        "in_channels": shapes["x_embedder.proj.weight"][1],
        "num_attention_heads": heads,
        "attention_head_dim": 2 * half_head,
        "num_layers": depth_of(list(shapes)),
        "pooled_projection_dim": shapes["t5_yproj.weight"][0],
        "text_embed_dim": shapes["t5_yproj.weight"][1],
        "time_embed_dim": shapes["t_embedder.mlp.0.weight"][1],
    }

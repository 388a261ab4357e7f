"""Genmo's own numbers: our forward on translated weights against outputs of Genmo's model code."""

from functools import cache
from pathlib import Path

import pytest
import torch
from golden_files import FOLDER, load_golden
from inputs import relative

from mochi_lora.engine.plan import Plan
from mochi_lora.model import keymap
from mochi_lora.model.adapter import put, strengths
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.keymap import Rows
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.model.weights import load_transformer

LORA = FOLDER / "lora_small.safetensors"
CASES = range(4)  # valid text tokens: 24, 7, 0, 13
SWAPPED = [("mlp_x.w1", keymap._INSIDE), ("mlp_y.w1", keymap._INSIDE), ("final_layer.mod", keymap._OUTSIDE)]


@cache
def cases() -> dict[str, torch.Tensor]:
    return load_golden("asymmdit_cases")[0]


def load(base: Path) -> VelocityModel:
    loaded = load_transformer(base, device=torch.device("cpu"), precision="fp32")
    return VelocityModel(loaded.transformer, Plan("cpu", "fp32", "auto", "none"))


def error(model: VelocityModel, case: int, expected: str) -> float:
    tensors = {key.removeprefix(f"case{case}."): value for key, value in cases().items() if key.startswith(f"case{case}.")}
    text = TextBatch(tensors["text"], tuple(tensors["text_mask"].sum(1).tolist()))
    with torch.no_grad():
        return relative(model(tensors["latents"], tensors["sigma"], text), tensors[expected])


@pytest.mark.parametrize("case", CASES)
def test_our_velocity_is_genmos(genmo_base: Path, case: int) -> None:
    assert error(load(genmo_base), case, "velocity") < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_our_velocity_with_genmos_lora_is_genmos(genmo_base: Path, case: int) -> None:
    model = load(genmo_base)
    put(model.transformer, load_adapter(LORA), "genmo")
    with strengths(model.transformer, ["genmo"], [1.0]):
        assert error(model, case, "velocity_lora") < 1e-5
        assert error(model, case, "velocity") > 0.1


@pytest.mark.parametrize(("module", "table"), SWAPPED, ids=[module for module, _ in SWAPPED])
def test_halves_left_unswapped_give_another_velocity(
    monkeypatch, genmo_base: Path, module: str, table: dict[str, Rows]
) -> None:
    monkeypatch.setitem(table, module, Rows(table[module].names, swap_halves=False))
    assert error(load(genmo_base), 0, "velocity") > 0.01


def test_swapped_queries_and_keys_of_a_lora_give_another_velocity(monkeypatch, genmo_base: Path) -> None:
    query, key, value = keymap._INSIDE["attn.qkv_x"].names
    model = load(genmo_base)
    monkeypatch.setitem(keymap._INSIDE, "attn.qkv_x", Rows((value, key, query)))
    put(model.transformer, load_adapter(LORA), "genmo")
    with strengths(model.transformer, ["genmo"], [1.0]):
        assert error(model, 0, "velocity_lora") > 0.01


def test_every_genmo_tensor_becomes_its_own_diffusers_tensor(genmo_base: Path) -> None:
    tensors, _ = load_golden("asymmdit_small")
    depth = keymap.depth_of(list(tensors))
    names = [name for key, tensor in tensors.items() for name in keymap.weights_to_diffusers(key, tensor, depth)]
    assert depth == 2
    assert len(names) == len(set(names))
    assert set(names) == set(load(genmo_base).transformer.state_dict())


def test_a_fused_lora_moves_the_fused_weight_as_its_parts_move_theirs() -> None:
    """Delta W of q, k and v stacked is delta W of qkv; halves of a SwiGLU projection come back swapped."""
    draw = torch.Generator().manual_seed(0)
    factor_a, factor_b = torch.randn(4, 8, generator=draw), torch.randn(12, 4, generator=draw)
    fused = factor_b @ factor_a
    parts = keymap.lora_to_diffusers("blocks.0.attn.qkv_y", factor_a, factor_b, depth=2)
    assert list(parts) == [f"transformer_blocks.0.attn1.add_{part}_proj" for part in "qkv"]
    torch.testing.assert_close(torch.cat([b @ a for a, b in parts.values()]), fused)
    ((swapped_a, swapped_b),) = keymap.lora_to_diffusers("blocks.0.mlp_x.w1", factor_a, factor_b, depth=2).values()
    torch.testing.assert_close(swapped_b @ swapped_a, torch.cat([fused[6:], fused[:6]]))


def test_the_last_blocks_text_modulation_has_a_name_of_its_own() -> None:
    assert keymap.rows_of("blocks.0.mod_y", depth=2).names == ("transformer_blocks.0.norm1_context.linear",)
    assert keymap.rows_of("blocks.1.mod_y", depth=2).names == ("transformer_blocks.1.norm1_context.linear_1",)


@pytest.mark.parametrize("module", ["blocks.0.attn.qkv_z", "vae.encoder"])
def test_a_name_that_is_not_genmos_has_no_rows(module: str) -> None:
    with pytest.raises(KeyError):
        keymap.rows_of(module, depth=2)


def test_the_configuration_is_read_off_the_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_golden("asymmdit_small")[0].items()}
    assert keymap.config_of(shapes) == {
        "patch_size": 2,
        "in_channels": 12,
        "num_attention_heads": 4,
        "attention_head_dim": 48,
        "num_layers": 2,
        "pooled_projection_dim": 96,
        "text_embed_dim": 64,
        "time_embed_dim": 256,
    }

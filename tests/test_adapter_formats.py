"""Adapters in three layouts: what is written means the same, is named as its readers ask, or is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import MochiPipeline
from inputs import SHAPE, captions, normal, relative, velocity
from low_rank import GENMO, PRESETS, deltas, fused_deltas, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.interop import conversion
from mochi_lora.interop.adapter_formats import detect, read_stored, stored_factors, write_stored
from mochi_lora.interop.conversion import convert
from mochi_lora.interop.factors import Factors
from mochi_lora.interop.merging import merge
from mochi_lora.model.adapter import Adapter, put, strengths
from mochi_lora.model.adapter_file import load_adapter, read_provenance, save_adapter
from mochi_lora.model.transformer import timestep_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

# What ComfyUI looks for in Genmo's model of two blocks: `diffusion_model.` and the weight's own name without `.weight`.
COMFYUI = {
    *("blocks.0.attn.qkv_x", "blocks.0.attn.qkv_y", "blocks.0.attn.proj_x", "blocks.0.attn.proj_y"),
    *("blocks.0.mlp_x.w1", "blocks.0.mlp_x.w2", "blocks.0.mlp_y.w1", "blocks.0.mlp_y.w2"),
    *("blocks.1.attn.qkv_x", "blocks.1.attn.qkv_y", "blocks.1.attn.proj_x"),  # the last block has no text output
    *("blocks.1.mlp_x.w1", "blocks.1.mlp_x.w2"),
}
SCALES = {"qkv": 8 / 4, "proj": 6 / 2}  # of the golden file


@pytest.fixture
def ours(load_tiny, tmp_path):
    """Writes a trained adapter; returns (its file, the adapter, the velocity with it)."""

    def write(**settings) -> tuple[Path, Adapter, torch.Tensor]:
        model = load_tiny()
        adapter = trained(model, **settings)
        save_adapter(tmp_path / "ours.safetensors", adapter, {"step": 7, "config": {"train": {"steps": 9}}})
        return tmp_path / "ours.safetensors", adapter, velocity(model)

    return write


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    assert found.keys() == expected.keys()
    return all(relative(found[name], expected[name]) < tolerance for name in expected)


def test_the_golden_lora_goes_to_diffusers_and_back(tmp_path: Path) -> None:
    before = fused_deltas(GENMO, scales=SCALES)
    convert(GENMO, tmp_path / "d.safetensors", "diffusers")
    done = convert(tmp_path / "d.safetensors", tmp_path / "g.safetensors", "genmo")
    stored, back = load_file(GENMO), load_file(tmp_path / "g.safetensors")
    assert {name: tensor.shape for name, tensor in back.items()} == {name: tensor.shape for name, tensor in stored.items()}
    assert same(fused_deltas(tmp_path / "g.safetensors"), before)
    assert done.error.worst[1] < 1e-6
    assert done.layers == 15


def test_the_golden_lora_means_the_same_in_comfyui(tmp_path: Path) -> None:
    convert(GENMO, tmp_path / "c.safetensors", "comfyui")
    found = fused_deltas(tmp_path / "c.safetensors", suffix=".weight", prefix="diffusion_model.")
    assert same(found, fused_deltas(GENMO, scales=SCALES))


@pytest.mark.parametrize("settings", [{"alpha": 16.0}, {"alpha": 2.0, "rslora": True}], ids=["alpha 16", "rslora"])
@pytest.mark.parametrize(
    ("targets", "way"), [*((targets, "comfyui") for targets in PRESETS), *((targets, "genmo") for targets in PRESETS[:2])]
)
def test_every_preset_comes_home_as_it_left(ours, tmp_path: Path, targets: str, way: str, settings: dict) -> None:
    path, adapter, _ = ours(targets=targets, **settings)
    scale = settings["alpha"] / (4**0.5 if settings.get("rslora") else 4)
    convert(path, tmp_path / "there.safetensors", way)
    convert(tmp_path / "there.safetensors", tmp_path / "home.safetensors", "diffusers")
    home = load_adapter(tmp_path / "home.safetensors")
    assert same(deltas(home, 1.0), deltas(adapter, scale))
    assert {tensor.shape[0] for name, tensor in home.tensors.items() if "lora_A" in name} == {4}
    assert home.config["lora_alpha"] == home.config["r"] == 4


@pytest.mark.parametrize("way", ["diffusers", "genmo", "comfyui"])
def test_stock_diffusers_gives_our_velocity_with_what_came_home(ours, tiny: Path, tmp_path: Path, way: str) -> None:
    path, _, expected = ours(alpha=10.0, targets="joint_attention")
    convert(path, tmp_path / "there.safetensors", way)
    convert(tmp_path / "there.safetensors", tmp_path / "home.safetensors", "diffusers")
    pipe = MochiPipeline.from_pretrained(tiny)
    pipe.load_lora_weights(tmp_path, weight_name="home.safetensors")
    text, time = captions(5), timestep_of(torch.tensor([0.7]))
    with torch.no_grad():
        found = pipe.transformer(normal(1, *SHAPE), text.tokens, time, torch.ones(1, 5, dtype=torch.bool), return_dict=False)[0]
    assert relative(found, expected) < 1e-5


def test_stock_diffusers_loads_a_file_of_mixed_ranks(ours, tiny: Path, tmp_path: Path) -> None:
    """Ranks 2 and 4 stand in the header's patterns."""
    path, _, _ = ours(alpha=8.0)
    factors = stored_factors(read_stored(path))
    for name in [name for name in factors if "to_q" in name]:
        factors[name] = type(factors[name])(factors[name].a[:2], factors[name].b[:, :2])
    write_stored(tmp_path / "mixed.safetensors", factors, "diffusers", {})
    pipe = MochiPipeline.from_pretrained(tiny)
    pipe.load_lora_weights(tmp_path, weight_name="mixed.safetensors", adapter_name="mixed")
    for name, part in factors.items():
        layer = pipe.transformer.get_submodule(name)
        found = layer.scaling["mixed"] * layer.lora_B["mixed"].weight @ layer.lora_A["mixed"].weight
        assert relative(found.detach(), part.delta()) < 1e-6


def test_our_own_model_runs_what_genmos_format_kept(ours, load_tiny, tmp_path: Path) -> None:
    path, _, expected = ours(alpha=10.0, targets="joint_attention")
    convert(path, tmp_path / "g.safetensors", "genmo")
    model = load_tiny()
    put(model.transformer, load_adapter(tmp_path / "g.safetensors"), "genmo")
    with strengths(model.transformer, ["genmo"], [1.0]):
        assert relative(velocity(model), expected) < 1e-5


def test_a_comfyui_file_has_the_names_that_comfyui_looks_for(ours, tmp_path: Path) -> None:
    path, _, _ = ours(targets="joint_attention_mlp")
    convert(path, tmp_path / "c.safetensors", "comfyui")
    expected = {f"diffusion_model.{module}.lora_{half}.weight" for module in COMFYUI for half in "AB"}
    assert load_file(tmp_path / "c.safetensors").keys() == expected


def test_stacked_ranks_fill_genmos_one_rank_for_qkv(ours, tmp_path: Path) -> None:
    """Three different A of rank 4 are one of rank 12; the last text query, which is never trained, makes that block's 8."""
    path, _, _ = ours(targets="joint_attention")
    convert(path, tmp_path / "g.safetensors", "genmo")
    tensors = load_file(tmp_path / "g.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A") and "qkv" in name} == {12}
    assert {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A") and "proj" in name} == {4}
    last = tensors["blocks.1.attn.qkv_y.lora_A"]
    assert last[:8].any(dim=1).all()
    assert not last[8:].any()
    with safe_open(tmp_path / "g.safetensors", framework="pt") as file:
        kwargs = json.loads(file.metadata()["kwargs"])
    expected = {"qkv_proj_lora_rank": 12, "qkv_proj_lora_alpha": 12, "qkv_proj_lora_dropout": 0.0}
    expected |= {"out_proj_lora_rank": 4, "out_proj_lora_alpha": 4, "out_proj_lora_dropout": 0.0}
    assert kwargs == expected


@pytest.mark.parametrize("way", ["genmo", "comfyui"])
def test_a_rank_below_the_exact_one_costs_what_is_reported(ours, tmp_path: Path, way: str) -> None:
    path, adapter, _ = ours(alpha=8.0, targets="joint_attention")
    done = convert(path, tmp_path / "small.safetensors", way, rank=4)
    convert(tmp_path / "small.safetensors", tmp_path / "home.safetensors", "diffusers")
    before, after = deltas(adapter, 2.0), deltas(load_adapter(tmp_path / "home.safetensors"), 1.0)
    for name, change in before.items():
        assert done.error.by_layer[name] == pytest.approx(relative(after[name], change), rel=1e-4, abs=1e-7)
    apart = sum(float((after[name] - change).norm() ** 2) for name, change in before.items()) ** 0.5
    whole = sum(float(change.norm() ** 2) for change in before.values()) ** 0.5
    assert done.error.total == pytest.approx(apart / whole, rel=1e-4)
    assert 0.1 < done.error.total < 1


def test_genmos_format_refuses_feed_forwards_by_name(ours, tmp_path: Path) -> None:
    path, _, _ = ours(targets="joint_attention_mlp")
    with pytest.raises(UserError, match=r"(?s)holds attention only.*6 of 13.*blocks\.0\.mlp_x\.w1.*convert to comfyui"):
        convert(path, tmp_path / "g.safetensors", "genmo")
    assert not (tmp_path / "g.safetensors").exists()


@pytest.mark.parametrize("to", ["diffusers", "genmo", "comfyui"])
def test_dora_is_refused_by_name(ours, tmp_path: Path, to: str) -> None:
    path, _, _ = ours(dora=True, targets="visual_attention")
    with pytest.raises(UserError, match=r"(?s)8 DoRA magnitudes.*to_k\.lora_magnitude_vector"):
        convert(path, tmp_path / "x.safetensors", to)
    assert not (tmp_path / "x.safetensors").exists()


def test_comfyuis_alpha_is_obeyed_and_its_absence_is_scale_one(tmp_path: Path) -> None:
    a, b = normal(4, 192, seed=1), normal(576, 4, seed=2)
    module = "diffusion_model.blocks.0.attn.qkv_x"
    for names in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        tensors = {f"{module}.{names[0]}.weight": a, f"{module}.{names[1]}.weight": b}
        for alpha, scale in ((None, 1.0), (8.0, 2.0)):
            extra = {} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)}
            save_file({**tensors, **extra}, tmp_path / "c.safetensors")
            found = deltas(read_stored(tmp_path / "c.safetensors").adapter, 1.0)
            expected = scale * (b.double() @ a.double())
            parts = [found[f"transformer_blocks.0.attn1.to_{part}"] for part in "qkv"]
            assert relative(torch.cat(parts), expected) < 1e-6


def test_an_inner_text_modulation_is_not_taken_for_the_last_blocks(tmp_path: Path) -> None:
    """A file that stops before the last block does not say how many there are, but the widths do."""
    for rows, name in ((384, "linear"), (96, "linear_1")):
        tensors = {"lora_A": normal(2, 192, seed=1), "lora_B": normal(rows, 2, seed=2)}
        save_file({f"diffusion_model.blocks.1.mod_y.{k}.weight": v for k, v in tensors.items()}, tmp_path / "c.safetensors")
        assert list(stored_factors(read_stored(tmp_path / "c.safetensors"))) == [f"transformer_blocks.1.norm1_context.{name}"]


def test_what_training_wrote_in_the_header_goes_along(ours, tmp_path: Path) -> None:
    path, _, _ = ours()
    convert(path, tmp_path / "c.safetensors", "comfyui")
    found = read_provenance(tmp_path / "c.safetensors")
    assert (found["step"], found["config"]) == (7, {"train": {"steps": 9}})
    assert found["converted_from"] == {"file": "ours.safetensors", "format": "diffusers"}


DIFFUSERS_KEY = "transformer.transformer_blocks.0.attn1.to_k.lora_A.weight"


@pytest.mark.parametrize(
    "keys",
    [
        ["lora_unet_blocks_0_attn_qkv_x.lora_up.weight"],
        ["transformer_blocks.0.attn1.to_q.lora_A.weight", DIFFUSERS_KEY],
        ["blocks.0.attn.qkv_x.weight", "blocks.0.attn.qkv_x.lora_A"],
        ["diffusion_model.blocks.0.attn.qkv_x.dora_scale"],
        [],
    ],
)
def test_unknown_tensors_are_listed(tmp_path: Path, keys: list[str]) -> None:
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a LoRA for Mochi in a layout known here") as caught:
        detect(tmp_path / "x.safetensors")
    assert all(key in str(caught.value) for key in keys[:1])


def test_more_than_one_layout_in_a_file_is_listed(tmp_path: Path) -> None:
    keys = [DIFFUSERS_KEY, "blocks.0.attn.qkv_x.lora_A", "diffusion_model.blocks.0.attn.qkv_x.lora_A.weight"]
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="more than one layout") as caught:
        detect(tmp_path / "x.safetensors")
    assert all(key in str(caught.value) for key in keys)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "diffusion_model.blocks.0.attn.qkv_z.lora_{}.weight",
            r"1 modules are not of Mochi's transformer:\n  blocks\.0\.attn\.qkv_z",
        ),
        ("diffusion_model.vae.conv.lora_{}.weight", r"not of Mochi's transformer:\n  vae\.conv"),
        ("transformer.transformer_blocks.0.cross.to_q.lora_{}.weight", r"not of Mochi's transformer:\n.*cross\.to_q"),
    ],
)
def test_a_module_of_another_model_is_named(tmp_path: Path, key: str, message: str) -> None:
    save_file({key.format(half): torch.ones(4, 4) for half in "AB"}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "comfyui", assume_alpha_is_rank=True)


@pytest.mark.parametrize("key", ["diffusion_model.blocks.0.attn.qkv_x.lora_A.weight", DIFFUSERS_KEY])
def test_half_a_pair_is_refused_by_name(tmp_path: Path, key: str) -> None:
    save_file({key: torch.ones(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"one factor without the other:\n  .*blocks\.0"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "genmo", assume_alpha_is_rank=True)


def test_an_adapter_that_has_diverged_is_refused(ours, tmp_path: Path) -> None:
    path, adapter, _ = ours()
    adapter.tensors["transformer_blocks.0.attn1.to_q.lora_B.weight"][3, 1] = float("nan")
    save_adapter(path, adapter, {})
    with pytest.raises(UserError, match=r"NaN or infinity.*\n.*to_q\.lora_B"):
        read_stored(path)


@pytest.mark.parametrize(("rows", "columns"), [(100, 192), (192, 100)])
def test_projections_of_one_fusion_must_have_one_shape(tmp_path: Path, rows: int, columns: int) -> None:
    tensors = {}
    for part, shape in (("to_q", (192, 192)), ("to_k", (rows, columns))):
        module = f"transformer.transformer_blocks.0.attn1.{part}"
        tensors |= {f"{module}.lora_A.weight": normal(2, shape[1]), f"{module}.lora_B.weight": normal(shape[0], 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv_x .* one shape, got 192 x 192 and"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "genmo", assume_alpha_is_rank=True)


def test_a_fused_module_that_cannot_be_cut_in_three_is_named(tmp_path: Path) -> None:
    tensors = {"lora_A": normal(2, 192), "lora_B": normal(100, 2)}
    save_file({f"diffusion_model.blocks.0.attn.qkv_x.{k}.weight": v for k, v in tensors.items()}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv_x has 100 output rows"):
        read_stored(tmp_path / "c.safetensors")


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "kwargs": {}}, tmp_path / "model_100.lora.pt")
    with pytest.raises(DamagedFileError, match="not a readable safetensors file"):
        detect(tmp_path / "model_100.lora.pt")


def test_a_file_that_does_not_read_back_is_deleted_and_named(ours, tmp_path: Path, monkeypatch) -> None:
    path, _, _ = ours()

    def bent(target, factors, to, provenance, *, rank=None):
        wrong = {name: type(part)(part.a, part.b * (1.001 if "1.attn1.to_v" in name else 1)) for name, part in factors.items()}
        write_stored(target, wrong, to, provenance, rank=rank)
        return factors

    monkeypatch.setattr(conversion, "write_stored", bent)
    with pytest.raises(DamagedFileError, match=r"transformer_blocks\.1\.attn1\.to_v reads back 1\.0e-03 off"):
        convert(path, tmp_path / "g.safetensors", "genmo")
    assert not (tmp_path / "g.safetensors").exists()


@pytest.mark.parametrize("place", ["0.attn1.to_q", "1.attn1.to_v"], ids=["where the factors cancel", "where they do not"])
def test_one_wrong_number_in_a_file_is_found(ours, tmp_path: Path, monkeypatch, place: str) -> None:
    """Also in a linear of which a sum leaves nothing: there a difference has no delta W to be measured against."""
    path, _, _ = ours(targets="joint_attention")
    factors = stored_factors(read_stored(path))
    name = "transformer_blocks.0.attn1.to_q"
    factors |= merge([({name: factors[name]}, 1.0), ({name: factors[name], "left": factors[name]}, -1.0)])
    del factors["left"]
    assert conversion.write_checked(tmp_path / "whole.safetensors", factors, "diffusers", {}).worst[1] < 1e-6

    def bent(target, factors, to, provenance, *, rank=None):
        wrong = {name: Factors(part.a.clone(), part.b.clone()) for name, part in factors.items()}
        wrong[f"transformer_blocks.{place}"].b[3, 1] *= 1.001
        write_stored(target, wrong, to, provenance, rank=rank)
        return factors

    monkeypatch.setattr(conversion, "write_stored", bent)
    with pytest.raises(DamagedFileError, match=rf"transformer_blocks\.{place} reads back \d.* off what was written"):
        conversion.write_checked(tmp_path / "g.safetensors", factors, "diffusers", {})
    assert not (tmp_path / "g.safetensors").exists()

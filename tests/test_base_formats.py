"""The base between Genmo's files and diffusers' folders: bit for bit, any depth, and never whole in memory."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from golden_files import FOLDER, load_golden
from inputs import normal
from safetensors.torch import load_file, save_file

from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.interop import base_formats, vae_names
from mochi_lora.interop.base_formats import to_diffusers, to_genmo
from mochi_lora.interop.base_merge import WEIGHTS
from mochi_lora.interop.stored import Stored, tensors_in, write_tensors
from mochi_lora.model import keymap
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import load_transformer, random_transformer

# Names and shapes of the published VAE's two files, from `state_dict()` of Genmo's own Encoder and Decoder.
GENMO_VAE = json.loads((FOLDER / "vae_genmo_names.json").read_text(encoding="utf-8"))
CPU = torch.device("cpu")


def identical(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_genmos_transformer_becomes_a_folder_that_stock_diffusers_loads(genmo_base: Path, tmp_path: Path) -> None:
    done = to_diffusers([genmo_base], tmp_path / "transformer")
    stock = MochiTransformer3DModel.from_pretrained(tmp_path / "transformer")
    direct = load_transformer(genmo_base, device=CPU, precision="fp32").transformer.state_dict()
    assert all(torch.equal(tensor, direct[name]) for name, tensor in stock.state_dict().items())
    assert (done.component, done.config["num_layers"]) == ("transformer", 2)


def test_genmos_transformer_comes_back_bit_for_bit(genmo_base: Path, tmp_path: Path) -> None:
    to_diffusers([genmo_base], tmp_path / "transformer")
    to_genmo(tmp_path / "transformer", tmp_path / "dit.safetensors")
    assert identical(tmp_path / "dit.safetensors", genmo_base)


def test_a_folder_comes_back_bit_for_bit_in_its_mixed_precision(tiny: Path, tmp_path: Path) -> None:
    """bf16 with float32 positions and norms; the configuration is read off the tensors."""
    to_genmo(tiny / "transformer", tmp_path / "genmo")
    to_diffusers([tmp_path / "genmo" / "dit.safetensors"], tmp_path / "back")
    assert identical(tmp_path / "back" / WEIGHTS, tiny / "transformer" / WEIGHTS)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tiny / "transformer" / "config.json").read_text()
    )


@pytest.mark.parametrize(("depth", "heads"), [(1, 2), (3, 3)])
def test_any_depth_and_width_is_read_off_the_tensors(tmp_path: Path, depth: int, heads: int) -> None:
    config = {"num_layers": depth, "num_attention_heads": heads, "attention_head_dim": 16, "pooled_projection_dim": 24}
    config |= {"text_embed_dim": 8, "time_embed_dim": 32, "in_channels": 12, "patch_size": 2}
    random_transformer(config, device=CPU, precision="fp32").save_pretrained(tmp_path / "a")
    to_genmo(tmp_path / "a", tmp_path / "dit.safetensors")
    to_diffusers([tmp_path / "dit.safetensors"], tmp_path / "b")
    assert identical(tmp_path / "a" / WEIGHTS, tmp_path / "b" / WEIGHTS)


def test_shards_are_read_as_one(tiny: Path, tmp_path: Path) -> None:
    MochiTransformer3DModel.from_pretrained(tiny / "transformer").save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    MochiTransformer3DModel.from_pretrained(tiny / "transformer").save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for name in ("sharded", "whole"):
        to_genmo(tmp_path / name, tmp_path / f"{name}.safetensors")
    assert identical(tmp_path / "sharded.safetensors", tmp_path / "whole.safetensors")


def test_the_vae_comes_back_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    to_genmo(tiny / "vae", tmp_path / "genmo")
    halves = [tmp_path / "genmo" / f"{half}.safetensors" for half in ("decoder", "encoder")]
    done = to_diffusers(halves, tmp_path / "vae")
    assert done.component == "vae"
    assert identical(tmp_path / "vae" / WEIGHTS, tiny / "vae" / WEIGHTS)
    assert json.loads((tmp_path / "vae" / "config.json").read_text()) == json.loads((tiny / "vae" / "config.json").read_text())
    MochiVae.load(tmp_path / "vae", device=CPU, precision="fp32")


@pytest.mark.parametrize(
    ("field", "value"),
    [("latents_mean", [0.5] * 12), ("latents_std", [2.0] * 12), ("scaling_factor", 0.5), ("act_fn", "relu")],
)
def test_what_no_file_of_genmos_says_is_refused_by_name(tiny: Path, tmp_path: Path, field: str, value: object) -> None:
    folder = Path(shutil.copytree(tiny / "vae", tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=rf"config\.json: {field} is not Mochi-1's.*Genmo's files cannot hold it"):
        to_genmo(folder, tmp_path / "genmo")
    assert not (tmp_path / "genmo").exists()


def test_a_vae_whose_configuration_leaves_the_statistics_out_has_mochis(tiny: Path, tmp_path: Path) -> None:
    """diffusers then takes its defaults, which are Genmo's numbers."""
    folder = Path(shutil.copytree(tiny / "vae", tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text())
    left = {name: value for name, value in config.items() if name not in {"latents_mean", "latents_std", "scaling_factor"}}
    (folder / "config.json").write_text(json.dumps(left | {"scaling_factor": 1}))
    to_genmo(folder, tmp_path / "genmo")


def test_the_published_vaes_names_and_shapes_are_genmos() -> None:
    with init_empty_weights():
        vae = AutoencoderKLMochi()
    shapes = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    found: dict[str, list[int]] = {}
    for module, names in vae_names.module_names(vae_names.blocks_of_config(vae.config)).items():
        for parameter in ("weight", "bias"):
            if parts := [shapes[f"{name}.{parameter}"] for name in names if f"{name}.{parameter}" in shapes]:
                found[f"{module}.{parameter}"] = [sum(part[0] for part in parts), *parts[0][1:]]
    assert found == {f"{half}.{name}": shape for half, tensors in GENMO_VAE.items() for name, shape in tensors.items()}


# Read off Genmo's constructors: a residual block is norm, SiLU, convolution, twice; shapes alone cannot tell its parts apart.
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.layers.0", "proj_in"),
        ("encoder.layers.3.stack.0", "block_in.resnets.2.norm1.norm_layer"),
        ("encoder.layers.4.layers.0", "down_blocks.0.conv_in.conv"),
        ("encoder.layers.5.layers.2.stack.2", "down_blocks.1.resnets.1.conv1.conv"),
        ("encoder.layers.5.layers.2.stack.3", "down_blocks.1.resnets.1.norm2.norm_layer"),
        ("encoder.layers.6.layers.6.stack.5", "down_blocks.2.resnets.5.conv2.conv"),
        ("encoder.layers.6.layers.6.attn_block.norm", "down_blocks.2.norms.5.norm_layer"),
        ("encoder.layers.9.attn_block.attn.out", "block_out.attentions.2.to_out.0"),
        ("decoder.blocks.0.0", "conv_in"),
        ("decoder.blocks.0.1.stack.3", "block_in.resnets.0.norm2.norm_layer"),
        ("decoder.blocks.1.blocks.5.stack.0", "up_blocks.0.resnets.5.norm1.norm_layer"),
        ("decoder.blocks.3.proj", "up_blocks.2.proj"),
        ("decoder.blocks.4.2.stack.5", "block_out.resnets.2.conv2.conv"),
    ],
)
def test_a_layer_of_the_vae_has_its_place(theirs: str, ours: str) -> None:
    names = vae_names.module_names(vae_names.Blocks((3, 3, 4, 6, 3), (False, True, True, True, True)))
    assert names[theirs] == (f"{theirs.split('.', maxsplit=1)[0]}.{ours}",)


def test_a_fused_attention_is_cut_into_queries_keys_and_values() -> None:
    (name,) = [key for key in vae_names.module_names(vae_names.Blocks((1, 1, 1), (False, True, False))) if key.endswith("qkv")]
    names = vae_names.module_names(vae_names.Blocks((1, 1, 1), (False, True, False)))[name]
    tensor = normal(6, 2)
    assert [key.rpartition(".")[2] for key in names] == ["to_q", "to_k", "to_v"]
    assert torch.equal(torch.cat([vae_names.cut(tensor, names)[key] for key in names]), tensor)


def test_the_published_vaes_configuration_is_read_off_its_tensors() -> None:
    shapes = {f"{half}.{name}": tuple(shape) for half, tensors in GENMO_VAE.items() for name, shape in tensors.items()}
    found = vae_names.config_of(shapes, vae_names.blocks_of_genmo(list(shapes), "x"))
    with init_empty_weights():
        published = AutoencoderKLMochi().config
    assert found == {key: tuple(published[key]) if isinstance(value, tuple) else published[key] for key, value in found.items()}
    assert found["layers_per_block"] == (3, 3, 4, 6, 3)


def test_the_way_back_undoes_every_cut() -> None:
    for module in ("blocks.0.attn.qkv_y", "blocks.0.mlp_x.w1", "final_layer.mod", "blocks.1.mod_y"):
        rows, tensor = keymap.rows_of(module, 2), normal(12, 5)
        parts = rows.split(tensor)
        assert torch.equal(rows.join([parts[name] for name in rows.names]), tensor)
        assert {keymap.module_of(name) for name in rows.names} == {module}


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Read when its turn comes, and let go before the next."""
    made: list[weakref.ref] = []
    alive: list[int] = []

    def stored(number: int) -> Stored:
        def read() -> torch.Tensor:
            alive.append(sum(other() is not None for other in made))
            tensor = torch.full((1000,), float(number))
            made.append(weakref.ref(tensor))
            return tensor

        return Stored((1000,), torch.float32, read)

    write_tensors(tmp_path / "x.safetensors", {f"t{number}": stored(number) for number in range(9)})
    assert alive[0] == 0
    assert max(alive) <= 1, "the one just written may still be held by its name"
    assert len(alive) == 9
    assert all(float(tensor[0]) == float(name[1:]) for name, tensor in load_file(tmp_path / "x.safetensors").items())


def test_what_is_written_by_hand_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.ones(3, dtype=torch.bfloat16),
        "wide": normal(2, 3),
        "half": normal(5).half(),
        "scalar": normal(1)[0],
    }
    save_file(tensors, tmp_path / "a.safetensors")
    write_tensors(tmp_path / "b.safetensors", tensors_in(tmp_path / "a.safetensors"))
    assert identical(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


# --- what is refused ----------------------------------------------------------------------------------------------------


def genmo_without(tmp_path: Path, name: str) -> Path:
    tensors, _ = load_golden("asymmdit_small")
    tensors.pop(name)
    save_file(tensors, tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


@pytest.mark.parametrize("name", ["blocks.0.mlp_y.w2.weight", "pos_frequencies"])
def test_a_missing_tensor_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"ff_context\.net\.2\.weight|pos_frequencies"):
        to_diffusers([genmo_without(tmp_path, name)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv_z.weight", "blocks.0.attn.qkv_x.scale_weight", "scaled_fp8"])
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    """The last two are of the scaled fp8 checkpoints that ComfyUI reads."""
    save_file({**load_golden("asymmdit_small")[0], name: torch.ones(1)}, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match=name):
        to_diffusers([tmp_path / "dit.safetensors"], tmp_path / "out")


def test_half_a_vae_is_refused(tiny: Path, tmp_path: Path) -> None:
    to_genmo(tiny / "vae", tmp_path / "genmo")
    with pytest.raises(UserError, match=r"got .*encoder\.safetensors \(encoder\); .*needs both halves"):
        to_diffusers([tmp_path / "genmo" / "encoder.safetensors"], tmp_path / "out")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of Genmo's three files; it holds blocks\.0\.attn"):
        to_diffusers([FOLDER / "lora_small.safetensors"], tmp_path / "out")


def test_a_folder_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKLWan"}))
    with pytest.raises(UserError, match="is a AutoencoderKLWan, expected MochiTransformer3DModel or AutoencoderKLMochi"):
        to_genmo(tmp_path / "vae", tmp_path / "out")


def test_what_is_there_is_not_overwritten(tiny: Path, genmo_base: Path, tmp_path: Path) -> None:
    (tmp_path / "dit.safetensors").write_text("mine")
    for convert in (lambda: to_genmo(tiny / "transformer", tmp_path), lambda: to_diffusers([genmo_base], tmp_path)):
        with pytest.raises(UserError, match="exists"):
            convert()
    assert (tmp_path / "dit.safetensors").read_text() == "mine"


def test_a_conversion_that_does_not_read_back_is_told_by_the_tensor(genmo_base: Path, tmp_path: Path, monkeypatch) -> None:
    def bent(path, tensors, tick):
        def read() -> torch.Tensor:
            return tensors["proj_out.bias"].read() + 1

        write_tensors(path, {**tensors, "proj_out.bias": Stored((48,), tensors["proj_out.bias"].dtype, read)}, tick)

    monkeypatch.setattr(base_formats, "write_tensors", bent)
    with pytest.raises(DamagedFileError, match=r"proj_out\.bias does not read back"):
        to_diffusers([genmo_base], tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists(), "a folder without it is not taken for a model"

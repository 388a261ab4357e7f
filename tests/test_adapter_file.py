"""The adapter file: what stock diffusers makes of ours, what we make of others', and what is refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import MochiPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from golden_files import FOLDER
from inputs import SHAPE, captions, normal, relative, velocity
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_lora import __version__
from mochi_lora.config.schema import AdapterConfig
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.model.adapter import Adapter, attach, current, plain_config, put, strengths
from mochi_lora.model.adapter_file import load_adapter, read_provenance, save_adapter
from mochi_lora.model.transformer import VelocityModel, timestep_of

# Stock diffusers asks for an autocast that a CPU does not have; it goes on in float32, as meant.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

Load = Callable[..., VelocityModel]
GENMO = FOLDER / "lora_small.safetensors"
NAME = "adapter.safetensors"


def stir(model: VelocityModel) -> None:
    for number, (name, parameter) in enumerate(model.transformer.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.05 * normal(*parameter.shape, seed=number))


def trained(load_tiny: Load, **settings) -> tuple[Adapter, torch.Tensor]:
    """An adapter that does something, and the velocity of the model it was taken from."""
    model = load_tiny()
    attach(model.transformer, AdapterConfig(rank=4, **settings), 0)
    stir(model)
    return current(model.transformer), velocity(model)


def applied(load_tiny: Load, adapter: Adapter) -> torch.Tensor:
    model = load_tiny()
    put(model.transformer, adapter, "loaded")
    with strengths(model.transformer, ["loaded"], [1.0]):
        return velocity(model)


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def stock_velocity(pipe: MochiPipeline) -> torch.Tensor:
    """What `inputs.velocity` asks our model, asked of the stock forward."""
    text = captions(5)
    with torch.no_grad():
        time, mask = timestep_of(torch.tensor([0.7])), torch.ones(1, 5, dtype=torch.bool)
        return pipe.transformer(normal(1, *SHAPE), text.tokens, time, mask, return_dict=False)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 16.0},
        {"alpha": 2.0, "rslora": True},
        {"alpha": 8.0, "dora": True},
        {"alpha": 1.0, "targets": "joint_attention_mlp"},
    ],
)
def test_stock_diffusers_loads_our_file_and_gives_our_velocity(
    tiny: Path, load_tiny: Load, tmp_path: Path, settings: dict
) -> None:
    adapter, ours = trained(load_tiny, **settings)
    save_adapter(tmp_path / NAME, adapter, {"step": 1})
    pipe = MochiPipeline.from_pretrained(tiny)
    base = stock_velocity(pipe)
    pipe.load_lora_weights(tmp_path, weight_name=NAME, adapter_name="ours")
    assert pipe.get_list_adapters() == {"transformer": ["ours"]}
    assert relative(stock_velocity(pipe), ours) < 1e-5
    assert relative(base, ours) > 0.01
    if not settings.get("dora"):
        pipe.fuse_lora()
        assert relative(stock_velocity(pipe), ours) < 1e-5


def test_a_file_without_its_alpha_is_another_adapter_to_stock_diffusers(tiny: Path, load_tiny: Load, tmp_path: Path) -> None:
    """Why the header is written: without it diffusers takes alpha = rank and says nothing."""
    adapter, ours = trained(load_tiny, alpha=16.0)
    save_adapter(tmp_path / NAME, adapter, {})
    save_file(load_file(tmp_path / NAME), tmp_path / NAME)
    pipe = MochiPipeline.from_pretrained(tiny)
    pipe.load_lora_weights(tmp_path, weight_name=NAME)
    assert relative(stock_velocity(pipe), ours) > 0.01


@pytest.mark.parametrize("settings", [{"alpha": 16.0}, {"rslora": True}, {"dora": True}, {"dropout": 0.1}])
def test_saving_and_loading_gives_the_same_adapter(load_tiny: Load, tmp_path: Path, settings: dict) -> None:
    adapter, before = trained(load_tiny, **settings)
    save_adapter(tmp_path / NAME, adapter, {})
    loaded = load_adapter(tmp_path / NAME)
    assert loaded.config == json.loads(json.dumps(adapter.config))
    assert loaded.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in adapter.tensors.items())
    if "dropout" not in settings:
        assert relative(applied(load_tiny, loaded), before) < 1e-6


def test_a_file_written_by_stock_diffusers_is_read_with_its_alpha(tiny: Path, load_tiny: Load, tmp_path: Path) -> None:
    pipe = MochiPipeline.from_pretrained(tiny)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=r"transformer_blocks\.\d+\.attn1\.(to_q|add_v_proj)")
    pipe.transformer.add_adapter(config)
    for number, (name, parameter) in enumerate(pipe.transformer.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.1 * normal(*parameter.shape, seed=number))
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=plain_config(config),
        weight_name=NAME,
    )
    theirs = stock_velocity(pipe)
    assert relative(applied(load_tiny, load_adapter(tmp_path / NAME)), theirs) < 1e-5
    assert read_provenance(tmp_path / NAME) == {}


def test_provenance_comes_back_as_it_was_written(load_tiny: Load, tmp_path: Path) -> None:
    written = {
        "base": "somewhere/mochi",
        "fingerprint": "0123",
        "step": 200,
        "config": {"train": {"betas": [0.9, 0.999]}},
        "title": "Füße",
    }
    save_adapter(tmp_path / NAME, trained(load_tiny)[0], written)
    assert read_provenance(tmp_path / NAME) == {"version": __version__, **written}


def test_the_same_adapter_is_the_same_file(load_tiny: Load, tmp_path: Path) -> None:
    """But for the order of the header's entries, which safetensors leaves to chance; PEFT's sets must not add to that."""
    adapter, _ = trained(load_tiny)
    for name in ("a", "b"):
        save_adapter(tmp_path / name, adapter, {"step": 1})
    assert load_file(tmp_path / "a").keys() == load_file(tmp_path / "b").keys()
    assert header_of(tmp_path / "a") == header_of(tmp_path / "b")
    assert all(torch.equal(tensor, load_file(tmp_path / "b")[name]) for name, tensor in load_file(tmp_path / "a").items())


def test_no_half_written_file_is_left_under_any_name(load_tiny: Load, tmp_path: Path, monkeypatch) -> None:
    adapter, _ = trained(load_tiny)
    save_adapter(tmp_path / NAME, adapter, {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == [NAME]

    def fail(_tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("cable pulled")

    monkeypatch.setattr("mochi_lora.model.adapter_file.save_file", fail)
    with pytest.raises(OSError, match="cable pulled"):
        save_adapter(tmp_path / NAME, adapter, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert read_provenance(tmp_path / NAME)["step"] == 1


def test_a_file_without_alpha_is_refused_unless_told_that_it_is_the_rank(load_tiny: Load, tmp_path: Path) -> None:
    adapter, before = trained(load_tiny, alpha=4.0, targets="joint_attention_mlp")
    save_file({f"transformer.{name}": tensor for name, tensor in adapter.tensors.items()}, tmp_path / NAME)
    with pytest.raises(UserError, match=f"{NAME}: the file does not say its alpha.*--assume-alpha rank"):
        load_adapter(tmp_path / NAME)
    told = load_adapter(tmp_path / NAME, assume_alpha_is_rank=True)
    assert relative(applied(load_tiny, told), before) < 1e-6
    model = load_tiny()
    put(model.transformer, adapter, "first")
    put(model.transformer, told, "second")  # a list of 20 modules, which PEFT shortens by looking at the model's names
    with strengths(model.transformer, ["first", "second"], [0.0, 1.0]):
        assert relative(velocity(model), before) < 1e-6


def test_alpha_as_rank_holds_for_every_rank_in_a_file_of_mixed_ranks(load_tiny: Load, tmp_path: Path) -> None:
    tensors = {}
    for part, rank in (("to_q", 2), ("to_k", 2), ("to_v", 6)):
        module = f"transformer.transformer_blocks.0.attn1.{part}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = normal(rank, 192), 0.1 * normal(192, rank)
    save_file(tensors, tmp_path / NAME)
    found = applied(load_tiny, load_adapter(tmp_path / NAME, assume_alpha_is_rank=True))
    model = load_tiny()
    for part in ("to_q", "to_k", "to_v"):
        factor_a, factor_b = (tensors[f"transformer.transformer_blocks.0.attn1.{part}.lora_{which}.weight"] for which in "AB")
        getattr(model.transformer.transformer_blocks[0].attn1, part).weight.data += factor_b @ factor_a
    assert relative(found, velocity(model)) < 1e-5


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", "{}", '{"text_encoder.r": 4}', '{"transformer.r": 4}', '{"transformer.lora_alpha": 4}'],
)
def test_a_header_that_does_not_tell_rank_and_alpha_is_refused(load_tiny: Load, tmp_path: Path, metadata: str) -> None:
    """PEFT would fill in its own defaults, alpha 8 among them."""
    adapter, _ = trained(load_tiny)
    tensors = {f"transformer.{name}": tensor for name, tensor in adapter.tensors.items()}
    save_file(tensors, tmp_path / NAME, metadata={LORA_ADAPTER_METADATA_KEY: metadata})
    with pytest.raises(UserError, match=NAME):
        load_adapter(tmp_path / NAME)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_blocks_0_attn_qkv_x.lora_up.weight",
        "diffusion_model.blocks.0.attn.qkv_x.lora_A.weight",
        "transformer_blocks.0.attn1.to_q.lora_A.weight",
        "base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn1.to_q.alpha",
    ],
)
def test_a_foreign_format_is_refused_by_the_tensor_that_gives_it_away(tmp_path: Path, key: str) -> None:
    good = {f"transformer.transformer_blocks.0.attn1.to_k.lora_{which}.weight": torch.zeros(4, 4) for which in "AB"}
    save_file({**good, key: torch.zeros(4, 4)}, tmp_path / NAME)
    with pytest.raises(UserError, match=f"{NAME}: not a Mochi LoRA .*unknown tensor {key}.*mochi-lora convert lora"):
        load_adapter(tmp_path / NAME, assume_alpha_is_rank=True)


def test_a_file_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / NAME)
    with pytest.raises(UserError, match=f"{NAME}: not a Mochi LoRA"):
        load_adapter(tmp_path / NAME, assume_alpha_is_rank=True)


class _Trap:
    """Runs when a pickle of it is opened."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickles_and_rubbish_are_refused_unopened(tmp_path: Path) -> None:
    torch.save({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter.pt")
    (tmp_path / "adapter.bin").write_bytes(pickle.dumps(_Trap()))
    (tmp_path / NAME).write_bytes(b"not a tensor in sight")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("adapter.pt", "adapter.bin", NAME, "empty.safetensors"):
        with pytest.raises(DamagedFileError, match=f"{name}: not a readable safetensors file"):
            load_adapter(tmp_path / name)


def test_a_truncated_file_is_refused_by_name(load_tiny: Load, tmp_path: Path) -> None:
    save_adapter(tmp_path / NAME, trained(load_tiny)[0], {})
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[:-1])
    for read in (load_adapter, read_provenance):
        with pytest.raises(DamagedFileError, match=NAME):
            read(tmp_path / NAME)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such adapter file"):
        load_adapter(tmp_path / name)


def test_genmos_scale_is_folded_into_b() -> None:
    stored, adapter = load_file(GENMO), load_adapter(GENMO)
    for module, parts, scale in (
        ("blocks.0.attn.qkv_x", ["to_q", "to_k", "to_v"], 8 / 4),
        ("blocks.1.attn.qkv_y", ["add_q_proj", "add_k_proj", "add_v_proj"], 8 / 4),
        ("blocks.0.attn.proj_x", ["to_out.0"], 6 / 2),
        ("blocks.0.attn.proj_y", ["to_add_out"], 6 / 2),
    ):
        block = module.split(".")[1]
        names = [f"transformer_blocks.{block}.attn1.{part}" for part in parts]
        ours = torch.cat([adapter.tensors[f"{n}.lora_B.weight"] @ adapter.tensors[f"{n}.lora_A.weight"] for n in names])
        torch.testing.assert_close(ours, scale * stored[f"{module}.lora_B"] @ stored[f"{module}.lora_A"])
    ranks = {name: adapter.tensors[f"{name}.lora_A.weight"].shape[0] for name in adapter.config["target_modules"]}
    assert set(ranks.values()) == {2, 4}
    for name, rank in ranks.items():
        assert adapter.config["rank_pattern"].get(name, adapter.config["r"]) == rank
        assert adapter.config["alpha_pattern"].get(name, adapter.config["lora_alpha"]) == rank


def test_a_genmo_lora_saved_by_us_is_still_the_same_adapter(tmp_path: Path) -> None:
    adapter = load_adapter(GENMO)
    save_adapter(tmp_path / NAME, adapter, {})
    again = load_adapter(tmp_path / NAME)
    assert again.config == adapter.config
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in adapter.tensors.items())


QKV_ONLY = '{"qkv_proj_lora_rank": 4, "qkv_proj_lora_alpha": 8}'


@pytest.mark.parametrize("metadata", [None, {"kwargs": "{"}, {"kwargs": "{}"}, {"kwargs": QKV_ONLY}, {"kwargs": "null"}])
def test_a_genmo_lora_without_its_alphas_is_refused(tmp_path: Path, metadata: dict | None) -> None:
    save_file(load_file(GENMO), tmp_path / NAME, metadata=metadata)
    with pytest.raises(UserError, match=f"{NAME}: .*`kwargs` (lacks|is not)"):
        load_adapter(tmp_path / NAME)


def test_a_genmo_lora_without_its_alphas_loads_at_scale_one_where_that_is_said(tmp_path: Path) -> None:
    save_file(load_file(GENMO), tmp_path / NAME)
    adapter, raw = load_adapter(tmp_path / NAME, assume_alpha_is_rank=True), load_file(GENMO)
    query = adapter.tensors["transformer_blocks.0.attn1.to_q.lora_B.weight"]
    assert torch.equal(query, raw["blocks.0.attn.qkv_x.lora_B"].float().chunk(3)[0])


@pytest.mark.parametrize("value", ['"8"', "true", "null"])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, value: str) -> None:
    kwargs = f'{{"qkv_proj_lora_alpha": {value}, "out_proj_lora_alpha": {value}}}'
    save_file(load_file(GENMO), tmp_path / NAME, metadata={"kwargs": kwargs})
    with pytest.raises(UserError, match=f"{NAME}: header says .*_alpha = .*expected a number"):
        load_adapter(tmp_path / NAME)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.attn.qkv_x.lora_C", r"qkv_x\.lora_C is not part of a Genmo-format LoRA"),
        ("blocks.0.mlp_x.w2.lora_A", r"mlp_x\.w2\.lora_A is not part of a Genmo-format LoRA"),
        ("blocks.0.attn.qkv_x.weight", r"qkv_x\.weight is not part of a Genmo-format LoRA"),
    ],
)
def test_a_stray_tensor_in_a_genmo_lora_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    save_file({**load_file(GENMO), name: torch.zeros(4, 4)}, tmp_path / NAME, metadata=header_of(GENMO))
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path / NAME)


def test_a_module_that_genmo_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    stray = {f"blocks.0.attn.proj_z.lora_{which}": torch.zeros(4, 4) for which in "AB"}
    save_file({**load_file(GENMO), **stray}, tmp_path / NAME, metadata=header_of(GENMO))
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.proj_z is no module of Mochi's transformer"):
        load_adapter(tmp_path / NAME)


def test_an_adapter_for_another_width_is_refused(load_tiny: Load) -> None:
    """The golden LoRA was made for 4 heads of 48, the tiny model has 6 of 32: names agree, text shapes do not."""
    adapter = load_adapter(GENMO)
    for name, tensor in adapter.tensors.items():
        if name.endswith("to_q.lora_A.weight"):
            adapter.tensors[name] = tensor[:, :100].clone()
    with pytest.raises(UserError, match=r"lora_small\.safetensors: .*another architecture"):
        put(load_tiny().transformer, adapter, "foreign")

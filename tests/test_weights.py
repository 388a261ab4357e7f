"""Loading a base: which tensors stay float32, and what is refused, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import MochiTransformer3DModel
from golden_files import FOLDER, load_golden
from inputs import relative, velocity
from safetensors.torch import load_file, save_file

from mochi_lora import spec
from mochi_lora.config.schema import AdapterConfig
from mochi_lora.engine.plan import Plan
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.model.adapter import attach, current
from mochi_lora.model.adapter_file import save_adapter
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import LoadedTransformer, load_transformer, random_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
HEAD = "proj_out.weight"
# Genmo keeps these in float32 (genmoai/mochi#115): the positions, and four norms in each block.
FLOAT32 = {"pos_frequencies"} | {
    f"transformer_blocks.{block}.attn1.{norm}.weight"
    for block in range(2)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
}

Edit = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny transformer that may be broken."""
    return Path(shutil.copytree(tiny / "transformer", tmp_path / "transformer"))


def load(source: Path, precision: str = "fp32") -> LoadedTransformer:
    return load_transformer(source, device=torch.device("cpu"), precision=precision)


def edit(folder: Path, change: Edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path) -> list[str]:
    """Cut the weights into two files with an index, as the published model is."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    places = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


def test_bf16_keeps_exactly_genmos_list_in_float32_bit_for_bit(tiny: Path) -> None:
    stored = load_file(tiny / "transformer" / WEIGHTS)
    state = load(tiny / "transformer", "bf16").transformer.state_dict()
    assert {name for name, tensor in state.items() if tensor.dtype == torch.float32} == FLOAT32
    assert {tensor.dtype for name, tensor in state.items() if name not in FLOAT32} == {torch.bfloat16}
    for name in FLOAT32:
        assert torch.equal(state[name], stored[name]), name


def test_a_float32_base_loses_nothing_but_in_bf16_only_what_must_be_rounded(folder: Path) -> None:
    """Positions that bf16 cannot hold survive loading at bf16; `from_pretrained` rounds them."""
    positions = torch.linspace(0, 1, 3 * 6 * 16).view(3, 6, 16)
    edit(
        folder,
        lambda tensors: tensors.update({name: t.float() for name, t in tensors.items()} | {"pos_frequencies": positions}),
    )
    loaded = load(folder, "bf16")
    assert torch.equal(loaded.transformer.pos_frequencies, positions)
    assert loaded.rounded == ()
    stock = MochiTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert not torch.equal(stock.pos_frequencies.float(), positions)


def test_a_file_that_was_stored_rounded_says_so(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    loaded = load(folder, "bf16")
    assert set(loaded.rounded) == FLOAT32
    assert loaded.transformer.pos_frequencies.dtype == torch.float32


def test_what_is_loaded_is_frozen_and_in_evaluation_mode(tiny: Path) -> None:
    transformer = load(tiny / "transformer").transformer
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert not any(module.training for module in transformer.modules())
    assert not any(tensor.is_meta for tensor in [*transformer.parameters(), *transformer.buffers()])


def test_shards_with_an_index_are_the_same_model(tiny: Path, folder: Path) -> None:
    shard(folder)
    whole, sharded = load(tiny / "transformer").transformer.state_dict(), load(folder).transformer.state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in whole.items())


def test_the_bf16_variant_is_read_where_there_is_nothing_else(tiny: Path, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bf16.safetensors")
    assert torch.equal(load(folder).transformer.proj_out.weight, load(tiny / "transformer").transformer.proj_out.weight)


def test_a_missing_shard_is_refused_by_name(folder: Path) -> None:
    _, second = shard(folder)
    (folder / second).unlink()
    with pytest.raises(UserError, match=rf"{second}: named by the index but not there"):
        load(folder)


def test_a_tensor_that_stands_in_two_shards_is_refused_by_name(folder: Path) -> None:
    first, second = shard(folder)
    save_file(load_file(folder / first) | load_file(folder / second), folder / second)
    with pytest.raises(UserError, match=r"is not part of this transformer \(extra, or given twice\)"):
        load(folder)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[HEAD]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer_blocks.2.attn1.to_q.weight"] = torch.zeros(1)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[HEAD][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"1 tensors are missing \(proj_out\.weight"),
        (_add, r"transformer_blocks\.2\.attn1\.to_q\.weight is not part of this transformer"),
        (_reshape, r"proj_out\.weight has shape \(47, 192\), its config\.json expects \(48, 192\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_the_tensors_name(folder: Path, change: Edit, message: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_a_damaged_file_is_refused_by_name(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    for damaged in (content[: len(content) // 2], content[:4], b"", b"\xff" * 200):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=rf"{WEIGHTS}: not a readable safetensors file"):
            load(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("broken", [None, "{", "{}"])
def test_an_unreadable_configuration_is_refused_by_name(folder: Path, broken: str | None) -> None:
    if broken is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(broken)
    with pytest.raises(UserError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize("broken", ["{", "{}"])
def test_an_unreadable_index_is_refused_by_name(folder: Path, broken: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(broken)
    with pytest.raises(UserError, match=INDEX):
        load(folder)


def test_an_adapter_file_given_as_a_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    transformer = load(tiny / "transformer").transformer
    attach(transformer, AdapterConfig(), 0)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, current(transformer), {})
    with pytest.raises(UserError, match=r"adapter\.safetensors: not a transformer in Genmo's format"):
        load(path)
    shutil.copy(tiny / "transformer" / "config.json", tmp_path)
    path.rename(tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"lora_A\.weight is not part of this transformer"):
        load(tmp_path)


def test_a_genmo_lora_given_as_a_base_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(
        UserError, match=r"lora_small\.safetensors: tensor 'pos_frequencies' is missing.*a LoRA file given as a base"
    ):
        load(FOLDER / "lora_small.safetensors")


def test_a_genmo_file_with_a_stranger_in_it_is_refused_by_name(tmp_path: Path) -> None:
    tensors, _ = load_golden("asymmdit_small")
    save_file({**tensors, "blocks.0.attn.qkv_z.weight": torch.zeros(1)}, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv_z\.weight is not part of Genmo's transformer"):
        load(tmp_path / "dit.safetensors")


def test_the_published_architecture_has_the_published_number_of_parameters() -> None:
    with init_empty_weights():
        transformer = MochiTransformer3DModel()
    assert sum(parameter.numel() for parameter in transformer.parameters()) == spec.TRANSFORMER_PARAMETERS


def test_random_weights_follow_their_seed_and_leave_no_path_dead() -> None:
    def draw(seed: int) -> MochiTransformer3DModel:
        return random_transformer(TRANSFORMER, device=torch.device("cpu"), precision="fp32", seed=seed)

    state = torch.get_rng_state()
    first, again, other = draw(1).state_dict(), draw(1).state_dict(), draw(2).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first[HEAD], other[HEAD])
    assert all(tensor.abs().sum() > 0 for name, tensor in first.items() if tensor.ndim > 1)


def test_bf16_on_a_cpu_stays_close_to_float32(load_tiny: Callable[..., VelocityModel]) -> None:
    rounded = velocity(load_tiny("bf16"), lengths=(5, 0))
    assert rounded.dtype == torch.float32
    assert 1e-4 < relative(rounded, velocity(load_tiny("fp32"), lengths=(5, 0))) < 0.03


def test_a_genmo_base_runs_as_it_comes(genmo_base: Path) -> None:
    loaded = load(genmo_base, "bf16")
    assert set(loaded.rounded) == FLOAT32, "the golden file is float16 throughout"
    assert torch.isfinite(velocity(VelocityModel(loaded.transformer, Plan("cpu", "bf16", "auto", "full")))).all()

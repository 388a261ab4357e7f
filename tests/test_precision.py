"""What each precision makes of the base: which linears, in what form, on which device, and who refuses."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import MochiTransformer3DModel
from inputs import velocity
from torch import nn

from mochi_lora.engine import precision as precisions
from mochi_lora.engine.fp8 import Fp8Linear
from mochi_lora.engine.precision import format_of, part_of, precisions_of, quantise_linears, require_precision, weight_dtype
from mochi_lora.engine.quantised import Int8Linear, Nf4Linear, QuantisedLinear
from mochi_lora.errors import UserError
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import load_transformer, random_transformer

Load = Callable[..., VelocityModel]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
QUANTISED = ("fp8", "int8", "nf4")


def full_model() -> MochiTransformer3DModel:
    with init_empty_weights():
        return MochiTransformer3DModel()


def linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


# --- which linears ---


def test_every_linear_of_the_blocks_belongs_to_a_part_and_no_other_does() -> None:
    found = linears(full_model())
    inside = {name for name in found if name.startswith("transformer_blocks.")}
    assert {name for name in found if part_of(name)} == inside
    counts = Counter()
    for name in inside:
        counts[part_of(name)] += found[name].weight.numel()
    assert {part: round(count / 1e9, 2) for part, count in counts.items()} == {"visual": 5.44, "text": 1.79, "modulation": 2.7}


def test_an_adapters_own_linears_belong_to_none() -> None:
    assert part_of("transformer_blocks.0.attn1.to_q.lora_A.default") is None
    assert part_of("time_embed.pooler.to_q") is None


@pytest.mark.parametrize(
    ("precision", "form", "gigabytes"), [("fp8", Fp8Linear, 10.1), ("int8", Int8Linear, 10.1), ("nf4", Nf4Linear, 6.6)]
)
def test_the_full_model_takes_this_many_gigabytes(precision: str, form: type[QuantisedLinear], gigabytes: float) -> None:
    transformer = full_model()
    quantise_linears(transformer, precision)
    kinds = Counter(type(module) for name, module in linears(transformer).items() if part_of(name) != "modulation")
    assert kinds[form] == 48 * 12 - 3  # the last block has no text stream to give on
    held = sum(
        parameter.numel() * (parameter.element_size() if parameter.dtype != torch.float32 or "scale" in name else 2)
        for name, parameter in transformer.named_parameters()
    )
    assert held / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("precision", QUANTISED)
def test_what_is_not_quantised_is_as_in_bf16(load_tiny: Load, precision: str) -> None:
    plain, model = (load_tiny(which).transformer.state_dict() for which in ("bf16", precision))
    same = {name for name in plain if not format_of(name.removesuffix(".weight"), precision)}
    assert all(torch.equal(model[name], plain[name]) and model[name].dtype == plain[name].dtype for name in same)
    assert {model[name].dtype for name in same if "norm_q" in name or "pos_" in name} == {torch.float32}
    assert len(same) < len(plain)


def test_a_part_left_out_of_the_table_stays_bf16(load_tiny: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(precisions.FORMATS, "fp8", {"visual": Fp8Linear})
    block = load_tiny("fp8").transformer.transformer_blocks[0]
    assert isinstance(block.attn1.to_q, Fp8Linear)
    assert {type(block.attn1.add_q_proj), type(block.norm1.linear)} == {nn.Linear}
    assert block.norm1.linear.weight.dtype == weight_dtype("", "fp8") == torch.bfloat16


# --- how they get there ---


@pytest.mark.parametrize("precision", QUANTISED)
def test_the_tensors_on_disk_are_what_is_quantised(tiny: Path, precision: str) -> None:
    plain = linears(load_transformer(tiny / "transformer", device=CPU, precision="bf16").transformer)
    for name, module in linears(load_transformer(tiny / "transformer", device=CPU, precision=precision).transformer).items():
        if isinstance(module, QuantisedLinear):
            codes = module.encode(plain[name].weight.data)
            assert torch.equal(codes["weight"].view(torch.uint8), module.weight.view(torch.uint8))
            assert not module.weight.requires_grad
            assert module.training is False


def test_one_seed_draws_one_random_model() -> None:
    plain = linears(random_transformer(TRANSFORMER, device=CPU, precision="bf16"))
    for name, module in linears(random_transformer(TRANSFORMER, device=CPU, precision="fp8")).items():
        expected = plain[name].weight.data
        if isinstance(module, Fp8Linear):
            codes = module.encode(expected)
            assert torch.equal(module.weight.float(), codes["weight"].float())
            assert torch.equal(module.weight_scale, codes["weight_scale"])
        elif not isinstance(module, QuantisedLinear):
            assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("precision", ["bf16", *QUANTISED])
def test_a_tensor_goes_home_as_soon_as_it_is_rounded(tiny: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that blocks which are to be swapped never stand on the GPU together. Here `meta` plays the host."""
    rounded = []
    encode = Fp8Linear.encode
    monkeypatch.setattr(Fp8Linear, "encode", lambda self, weight: rounded.append(weight.device) or encode(self, weight))

    def home(name: str) -> torch.device:
        return torch.device("meta") if name.startswith("transformer_blocks.1.") else CPU

    transformer = load_transformer(tiny / "transformer", device=CPU, precision=precision, home=home).transformer
    for name, parameter in transformer.named_parameters():
        assert parameter.device == home(name), name
    assert set(rounded) == ({CPU} if precision == "fp8" else set())
    drawn = random_transformer(TRANSFORMER, device=CPU, precision=precision, home=home)
    assert all(parameter.device == home(name) for name, parameter in drawn.named_parameters())


def test_a_missing_tensor_is_still_named(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "diffusion_pytorch_model.safetensors"
    tensors = load_file(tiny / "transformer" / name)
    del tensors["transformer_blocks.0.attn1.to_q.weight"]
    save_file(tensors, tmp_path / name)
    (tmp_path / "config.json").write_text((tiny / "transformer" / "config.json").read_text())
    with pytest.raises(UserError, match=r"1 tensors are missing \(transformer_blocks.0.attn1.to_q.weight"):
        load_transformer(tmp_path, device=CPU, precision="fp8")


@pytest.mark.parametrize("precision", QUANTISED)
def test_everything_else_runs_in_bf16(load_tiny: Load, precision: str) -> None:
    model, seen = load_tiny(precision), []
    model.transformer.transformer_blocks[0].register_forward_hook(
        lambda _, inputs, outputs: seen.extend([*inputs[:2], *outputs])
    )
    result = velocity(model)
    assert {tensor.dtype for tensor in seen} == {torch.bfloat16}
    assert result.dtype == torch.float32
    assert result.isfinite().all()


# --- who can run them ---


def card(monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int], kernels: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(precisions, "_has_4_bit_kernels", lambda: kernels)


def test_a_cpu_runs_all() -> None:
    assert precisions_of(CPU) == ("bf16", "fp32", "fp8", "nf4", "int8")
    require_precision("fp8", CPU)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_new_cards_run_all(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    card(monkeypatch, capability=capability)
    assert set(precisions_of(GPU)) == {"bf16", "fp32", "fp8", "nf4", "int8"}


def test_a_card_without_fp8_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, capability=(8, 6))
    expected = r"engine.precision: fp8, but Some Card has no fp8 .* 8\.9 .*; set it to bf16, fp32, nf4 or int8$"
    with pytest.raises(UserError, match=expected):
        require_precision("fp8", GPU)
    require_precision("nf4", GPU)


def test_bitsandbytes_without_cuda_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, capability=(9, 0), kernels=False)
    with pytest.raises(UserError, match=r"nf4, but bitsandbytes has no CUDA kernels .*; set it to bf16, fp32, fp8 or int8$"):
        require_precision("nf4", GPU)


def test_it_is_refused_before_any_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, capability=(8, 0))
    with pytest.raises(UserError, match="has no fp8"):
        load_transformer(Path("nowhere"), device=GPU, precision="fp8")
    with pytest.raises(UserError, match="has no fp8"):
        random_transformer(TRANSFORMER, device=GPU, precision="fp8")

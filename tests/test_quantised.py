"""Linears held in 8 and 4 bits: bitsandbytes' numbers, our products, and LoRA over all of them."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from compiled_products import Gated, kept_when_compiled
from inputs import SHAPE, captions, hash_of_base, normal, relative, velocity
from torch import nn

from mochi_lora.config.schema import AdapterConfig
from mochi_lora.engine.quantised import Int8Linear, Nf4Linear, QuantisedLinear, WeightOnlyLinear
from mochi_lora.model import adapter as lora
from mochi_lora.model.quantised_adapter import QuantisedLora
from mochi_lora.model.transformer import VelocityModel

Load = Callable[..., VelocityModel]
CLASSES = (Int8Linear, Nf4Linear)
QUANTISED = ("fp8", "int8", "nf4")
EVERYTHING = {"rank": 4, "targets": "joint_attention_mlp"}


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return (normal(rows, columns, seed=seed) * columns**-0.5).bfloat16()


def linear(made: type[WeightOnlyLinear], columns: int = 192, rows: int = 96, seed: int = 0) -> WeightOnlyLinear:
    module = made(columns, rows, bias=False)
    module.quantise(weights(rows, columns, seed))
    return module


# --- the numbers are bitsandbytes' ---


def test_nf4_is_bitsandbytes_with_double_quantisation_bit_for_bit() -> None:
    import bitsandbytes

    theirs = bitsandbytes.nn.Linear4bit(
        192, 96, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    theirs.weight = bitsandbytes.nn.Params4bit(weights(96, 192), compress_statistics=True, quant_type="nf4", module=theirs)
    theirs = theirs.to("cpu")
    ours, x = linear(Nf4Linear), normal(5, 192).bfloat16().requires_grad_()
    assert torch.equal(ours.weight.flatten(), theirs.weight.flatten())
    result = ours(x)
    gradient = normal(5, 96, seed=1).bfloat16()
    result.backward(gradient)
    found, x.grad = x.grad, None
    expected = theirs(x)
    expected.backward(gradient)
    assert torch.equal(result, expected)
    assert torch.equal(found, x.grad)


def test_int8_is_bitsandbytes_rows() -> None:
    """Its codes may differ by one step where bitsandbytes rounds the weight to float16 first."""
    import bitsandbytes

    codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weights(96, 192).half())
    ours = linear(Int8Linear)
    assert (ours.weight.int() - codes.int()).abs().max() <= 1
    assert (ours.weight == codes).float().mean() > 0.99
    assert torch.allclose(ours.weight_scale * 127, largest)


@pytest.mark.parametrize(("made", "bar"), [(Int8Linear, 0.012), (Nf4Linear, 0.1)], ids=str)
def test_the_weight_errs_as_its_format_must(made: type[WeightOnlyLinear], bar: float) -> None:
    module = linear(made, 3072, 64)
    assert bar / 4 < relative(module.dequantize(), weights(64, 3072)) < bar


def test_a_row_of_zeros_stays_zero() -> None:
    weight = weights(96, 192)
    weight[3] = 0
    module = Int8Linear(192, 96, bias=False)
    module.quantise(weight)
    assert not module.dequantize()[3].any()
    assert module.dequantize().isfinite().all()


def test_a_byte_or_half_a_byte_per_weight() -> None:
    for made, expected in ((Int8Linear, 1.0), (Nf4Linear, 0.5 + 1 / 64 + 4 / 64 / 256)):
        module = linear(made, 3072, 1024)
        held = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        assert held / (3072 * 1024) == pytest.approx(expected, rel=2e-3)


# --- the products ---


@pytest.mark.parametrize("made", CLASSES)
@pytest.mark.parametrize("shape", [(192,), (1, 192), (2, 7, 192)], ids=str)
def test_the_product_is_that_of_the_decoded_weight_bit_for_bit(made: type[WeightOnlyLinear], shape: tuple[int, ...]) -> None:
    module, x = linear(made), normal(*shape, seed=1).bfloat16().requires_grad_()
    result = module(x)
    gradient = normal(*result.shape, seed=2).bfloat16()
    result.backward(gradient)
    decoded = module.decode(torch.bfloat16)
    assert torch.equal(result, nn.functional.linear(x, decoded))
    assert torch.equal(x.grad, gradient @ decoded)


@pytest.mark.parametrize("made", CLASSES)
def test_the_operator_keeps_torchs_rules(made: type[WeightOnlyLinear]) -> None:
    """Fakes, strides, no hidden mutation: what torch.compile relies on."""
    module = linear(made, 64, 32)
    x = normal(3, 64).bfloat16().requires_grad_()
    arguments = (x, module.weight, module.scales(), [32, 64], module.format)
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.mochi_lora.weight_only_product, arguments, {"transposed": False}, test_utils=names)


@pytest.mark.parametrize("made", CLASSES)
def test_compiled_without_a_break_it_keeps_no_decoded_weight(made: type[WeightOnlyLinear]) -> None:
    """Decoded in sight of the compiler, 20 GB of bf16 weights would be kept from the forward for the backward."""
    module = Gated(partial(linear, made))
    kept = kept_when_compiled(module)
    assert module.wide.weight.data_ptr() in {tensor.data_ptr() for tensor in kept}
    assert not [tensor for tensor in kept if tensor.numel() == 64 * 128 and tensor.dtype.is_floating_point]


def test_a_compiled_modulation_is_the_same_without_a_decoded_weight() -> None:
    torch._dynamo.reset()
    module, x = linear(Int8Linear, 192, 96), normal(1, 192, seed=1).bfloat16()
    module.bias = nn.Parameter(normal(96, seed=2).bfloat16(), requires_grad=False)
    graphs = []

    def see(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=see)
    assert relative(compiled(x), module(x)) < 5e-3
    assert "weight_only_product" not in graphs[0]


def test_everything_it_holds_moves_by_data() -> None:
    """As block swap does; between forward and backward too."""
    for made in CLASSES:
        module, other, x = linear(made), linear(made, seed=9), normal(3, 192).bfloat16().requires_grad_()
        result = module(x)
        for parameter, changed in zip(module.parameters(), other.parameters(), strict=True):
            parameter.data = changed.data
        result.float().sum().backward()
        found, x.grad = x.grad, None
        other(x).float().sum().backward()
        assert torch.equal(found, x.grad)
        assert torch.equal(module(x), other(x))


# --- LoRA over it ---


def attached(load_tiny: Load, precision: str, **settings: object) -> tuple[VelocityModel, dict[str, nn.Parameter]]:
    model = load_tiny(precision)
    parameters = lora.attach(model.transformer, AdapterConfig(**EVERYTHING | settings), 0)
    return model, parameters


def disturb(parameters: dict[str, nn.Parameter]) -> None:
    for number, (name, parameter) in enumerate(parameters.items()):
        if "lora_B" in name:
            parameter.data.copy_(0.05 * normal(*parameter.shape, seed=number))


def layers(model: VelocityModel) -> list[QuantisedLora]:
    return [module for module in model.transformer.modules() if isinstance(module, QuantisedLora)]


def gradients(model: VelocityModel, parameters: dict[str, nn.Parameter]) -> torch.Tensor:
    model(normal(2, *SHAPE), torch.tensor([0.3, 0.7]), captions(7, 3)).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters.values()])


@pytest.mark.parametrize("precision", QUANTISED)
def test_an_adapter_starts_from_the_same_float32_values_as_on_a_plain_base(load_tiny: Load, precision: str) -> None:
    _, plain = attached(load_tiny, "bf16")
    _, parameters = attached(load_tiny, precision)
    assert parameters.keys() == plain.keys()
    assert all(torch.equal(parameter, plain[name]) for name, parameter in parameters.items())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("precision", "bar"), [("int8", 0.04), ("fp8", 0.12), ("nf4", 0.3)])
def test_gradients_are_near_those_of_the_plain_base(load_tiny: Load, precision: str, bar: float, *, dora: bool) -> None:
    found = []
    for base in ("bf16", precision):
        model, parameters = attached(load_tiny, base, dora=dora)
        disturb(parameters)
        found.append(gradients(model, parameters))
    assert 0 < relative(found[1], found[0]) < bar


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_over_the_decoded_weights_a_plain_base_trains_alike(load_tiny: Load, precision: str) -> None:
    """What a weight-only format costs is its rounding and nothing else."""
    quantised, parameters = attached(load_tiny, precision)
    plain, expected = attached(load_tiny, "bf16")
    disturb(parameters)
    disturb(expected)
    modules = dict(quantised.transformer.named_modules())
    for name, module in plain.transformer.named_modules():
        if isinstance(modules[name], QuantisedLinear):
            module.weight.data.copy_(modules[name].decode(torch.bfloat16))
    assert torch.equal(gradients(quantised, parameters), gradients(plain, expected))


@pytest.mark.parametrize("precision", QUANTISED)
def test_dora_starts_from_the_norms_of_the_decoded_weight_and_changes_nothing(load_tiny: Load, precision: str) -> None:
    before = velocity(load_tiny(precision))
    model, parameters = attached(load_tiny, precision, dora=True)
    name = "transformer_blocks.0.attn1.to_q"
    magnitude = next(value for key, value in parameters.items() if key.startswith(name) and "magnitude" in key)
    layer = model.transformer.get_submodule(name)
    assert torch.allclose(magnitude, layer.base_layer.dequantize().norm(dim=1))
    assert relative(velocity(model), before) < 1e-2


@pytest.mark.parametrize("precision", QUANTISED)
def test_an_adapter_file_means_the_same_over_any_base(load_tiny: Load, precision: str) -> None:
    plain, parameters = attached(load_tiny, "bf16")
    disturb(parameters)
    adapter = lora.current(plain.transformer)
    model = load_tiny(precision)
    lora.put(model.transformer, adapter, "style")
    with lora.strengths(model.transformer, ["style"], [1.0]):
        found = velocity(model)
    with lora.strengths(model.transformer, ["style"], [0.0]):
        assert torch.equal(velocity(model), velocity(load_tiny(precision)))
    assert 0 < relative(found, velocity(plain)) < 0.2


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("precision", "bar"), [("int8", 0.03), ("fp8", 0.08), ("nf4", 0.2)])
def test_merging_rounds_and_unmerging_restores_bit_for_bit(load_tiny: Load, precision: str, bar: float, *, dora: bool) -> None:
    model, parameters = attached(load_tiny, precision, dora=dora)
    disturb(parameters)
    base, apart = hash_of_base(model.transformer), velocity(model)
    assert len(layers(model)) == len(parameters) // (3 if dora else 2)
    for layer in layers(model):
        layer.merge()
    assert hash_of_base(model.transformer) != base
    assert 0 < relative(velocity(model), apart) < bar
    for layer in layers(model):
        layer.unmerge()
    assert hash_of_base(model.transformer) == base
    assert torch.equal(velocity(model), apart)


def test_a_merge_that_is_not_finite_is_refused(load_tiny: Load) -> None:
    model, parameters = attached(load_tiny, "int8")
    next(value for name, value in parameters.items() if "lora_B" in name).data.fill_(torch.inf)
    broken = next(layer for layer in layers(model) if not layer.lora_B["default"].weight.isfinite().all())
    with pytest.raises(ValueError, match="not finite"):
        broken.merge(safe_merge=True)


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_copy_and_a_restored_state_are_the_same_model(load_tiny: Load, precision: str) -> None:
    model = load_tiny(precision)
    expected = velocity(model)
    assert torch.equal(velocity(copy.deepcopy(model)), expected)
    state = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    for parameter in model.transformer.parameters():
        parameter.data = torch.zeros_like(parameter.data)
    model.transformer.load_state_dict(state)
    assert torch.equal(velocity(model.to("cpu")), expected)


@pytest.mark.parametrize("precision", QUANTISED)
def test_training_over_it_learns(load_tiny: Load, precision: str) -> None:
    model, parameters = attached(load_tiny, precision)
    optimiser = torch.optim.AdamW(parameters.values(), lr=3e-3)
    noisy, sigma, text, target = normal(2, *SHAPE), torch.tensor([0.3, 0.7]), captions(7, 3), normal(2, *SHAPE, seed=5)
    base, losses = hash_of_base(model.transformer), []
    for _ in range(12):
        loss = (model(noisy, sigma, text) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert hash_of_base(model.transformer) == base

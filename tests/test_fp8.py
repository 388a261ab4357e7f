"""The fp8 linear: what it errs by, that emulation and kernel agree, and what the compiler makes of it."""

import copy

import pytest
import torch
from compiled_products import Gated, kept_when_compiled
from inputs import normal, relative

from mochi_lora.engine import fp8, gating
from mochi_lora.engine.fp8 import CODES, Fp8Linear, emulated_product, kernel_product, quantise_rows
from mochi_lora.engine.gating import gate

BAR = 0.05  # per linear, output and input gradient
# (K, N): the full model's widths, and the other way round; each product averages over one of the two.
SHAPES = {"3072 in": (3072, 256), "8192 in": (8192, 256), "16384 out": (256, 16384)}


def linear(columns: int, rows: int, weight: torch.Tensor | None = None, seed: int = 0) -> Fp8Linear:
    made = Fp8Linear(columns, rows, bias=False)
    made.quantise(normal(rows, columns, seed=seed) * columns**-0.5 if weight is None else weight)
    return made


def outliers(tensor: torch.Tensor) -> torch.Tensor:
    """Every hundredth channel a hundred times as large, as in trained transformers."""
    tensor = tensor.clone()
    tensor[:, ::100] *= 100
    return tensor


def heavy(tensor: torch.Tensor) -> torch.Tensor:
    """Student's t, near enough: a normal to the third power."""
    return tensor**3


@pytest.mark.parametrize("kind", [torch.clone, outliers, heavy])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_input_gradient_err_by_less_than_the_bar(shape: tuple[int, int], kind) -> None:
    columns, rows = shape
    weight = normal(rows, columns) * columns**-0.5
    module = linear(columns, rows, weight)
    x = kind(normal(12, columns, seed=1)).bfloat16().requires_grad_()
    result = module(x)
    gradient = kind(normal(12, rows, seed=2)).bfloat16()
    result.backward(gradient)
    assert result.dtype == x.grad.dtype == torch.bfloat16
    assert 0.01 < relative(result, x.detach().float() @ weight.t()) < BAR
    assert 0.01 < relative(x.grad, gradient.float() @ weight) < BAR


def test_a_weight_with_outlier_columns_stays_below_the_bar() -> None:
    weight = outliers(normal(256, 512)) * 512**-0.5
    x = normal(32, 512, seed=1).bfloat16()
    assert relative(linear(512, 256, weight)(x), x.float() @ weight.t()) < BAR


def test_the_emulation_is_what_the_kernel_computes() -> None:
    """torch has the operator on CPUs as well, with the same arguments: scales per row and column, the second column-major."""
    (left, left_scale), (right, right_scale) = quantise_rows(normal(33, 192)), quantise_rows(normal(48, 192, seed=1))
    arguments = (left, left_scale, right, right_scale.squeeze(1), torch.bfloat16)
    assert relative(kernel_product(*arguments), emulated_product(*arguments)) < 1e-3


def test_the_backward_uses_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of the weight: its transpose is multiplied, its scales are folded into the gradient."""
    module, seen = linear(64, 32), []

    def record(*arguments):
        seen.append(arguments[2])
        return emulated_product(*arguments)

    monkeypatch.setattr(fp8, "emulated_product", record)
    x = normal(5, 64, seed=1).requires_grad_()
    module(x).float().square().sum().backward()
    forward, backward = seen
    assert torch.equal(forward.float(), module.weight.float())
    assert torch.equal(backward.float(), module.weight.float().t())


def test_the_fused_feed_forward_layer_is_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two kernels replaced by their formulas: what is multiplied with what, and whose scales go where."""
    monkeypatch.setattr(gating, "gate_codes", lambda hidden: quantise_rows(gate(hidden)))

    def gradient_codes(
        gradient: torch.Tensor, hidden: torch.Tensor, factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            wide = hidden.detach().requires_grad_()
            return quantise_rows(torch.autograd.grad(gate(wide), wide, gradient)[0] * factors)

    monkeypatch.setattr(gating, "gate_gradient_codes", gradient_codes)
    first, last = linear(64, 192), linear(96, 64, seed=1)
    x = normal(12, 64, seed=2).bfloat16().requires_grad_()
    weights = first.weight, first.weight_scale, last.weight, last.weight_scale
    found, exact = gating._Fp8FeedForward.apply(x, *quantise_rows(x.detach()), *weights, torch.bfloat16), last(gate(first(x)))
    assert torch.equal(found, exact)
    above = normal(12, 64, seed=3).bfloat16()
    mine, true = (torch.autograd.grad(result, x, above)[0] for result in (found, exact))
    assert relative(mine, true) < 1e-6


def test_a_frozen_input_costs_no_backward_product() -> None:
    assert not linear(64, 32)(normal(5, 64)).requires_grad


def test_a_row_of_zeros_stays_zero_and_a_broken_row_is_seen() -> None:
    rows = normal(4, 64)
    rows[0], rows[1, 3], rows[2, 5] = 0, torch.nan, torch.inf
    result = linear(64, 32)(rows)
    assert not result[0].any()
    assert result[1].isnan().all()
    assert result[2].isnan().all()
    assert result[3].isfinite().all()


def test_large_and_small_rows_err_alike() -> None:
    module, x = linear(64, 32), normal(3, 64, seed=1)
    one, large, small = (module(x * factor).float() / factor for factor in (1, 2.0**60, 2.0**-20))
    assert torch.equal(one, large)
    assert torch.equal(one, small)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 7, 64)])
def test_any_number_of_rows_and_dimensions(shape: tuple[int, ...]) -> None:
    x = normal(*shape).requires_grad_()
    result = linear(64, 32)(x)
    result.float().sum().backward()
    assert result.shape == (*shape[:-1], 32)
    assert x.grad.shape == shape


def test_autocast_does_not_reach_the_emulation() -> None:
    module, x = linear(512, 64), normal(16, 512, seed=1)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), expected)


def test_a_cast_is_refused_and_a_move_and_a_copy_are_not() -> None:
    module, x = linear(64, 32), normal(3, 64)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module).to("cpu")(x), expected)
    other = linear(64, 32, seed=5)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    with pytest.raises(TypeError, match="held as fp8 cannot be cast"):
        module.to(torch.bfloat16)


def test_everything_it_holds_is_a_frozen_parameter() -> None:
    """Block swap moves parameters by `.data`; after that nothing may remember the old place."""
    module = linear(64, 32)
    assert {name: parameter.dtype for name, parameter in module.named_parameters()} == {
        "weight": CODES,
        "weight_scale": torch.float32,
    }
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not list(module.buffers())
    x = normal(3, 64).requires_grad_()
    result = module(x)
    other = linear(64, 32, seed=7)
    for parameter, changed in zip(module.parameters(), other.parameters(), strict=True):
        parameter.data = changed.data
    assert torch.equal(module(x), other(x))
    result.float().sum().backward()  # the backward reads what the parameters hold by then
    found, x.grad = x.grad, None
    other(x).float().sum().backward()
    assert torch.equal(found, x.grad)


# --- under the compiler ---


def test_compiled_without_a_break_it_keeps_no_transposed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 blocks of transposed copies would be 7 GB. Whether they are kept is up to torch's partitioner."""
    monkeypatch.setattr(fp8, "emulated_product", kernel_product)  # CPUs have the operator: the graph is the GPU's
    module = Gated(linear)
    kept = kept_when_compiled(module)
    codes = [tensor for tensor in kept if tensor.numel() == 64 * 128]
    assert {tensor.data_ptr() for tensor in codes} == {module.wide.weight.data_ptr(), module.narrow.weight.data_ptr()}


def test_another_number_of_rows_compiles_nothing_new() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear(64, 32), fullgraph=True, backend=counter, dynamic=True)
    for rows in (7, 20, 33):
        compiled(normal(1, rows, 64).requires_grad_()).float().sum().backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductors_code_gives_the_eager_codes() -> None:
    x = normal(140, 192).bfloat16()
    codes, scale = quantise_rows(x)
    compiled_codes, compiled_scale = torch.compile(quantise_rows, fullgraph=True)(x)
    assert torch.equal(scale, compiled_scale)
    assert torch.equal(codes.view(torch.uint8), compiled_codes.view(torch.uint8))

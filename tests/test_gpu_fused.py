"""On a CUDA device: the hand-written kernels against the formulas that run without them.

Run with `pytest -m gpu`.
"""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from diffusers.models.normalization import MochiRMSNorm
from inputs import normal, relative
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mochi_lora.engine.adapted import low_rank_sum, project
from mochi_lora.engine.fp8 import Fp8Linear, quantise_rows, row_codes, supports_fp8
from mochi_lora.engine.gating import GatedFeedForward, GatedProjection, gate, gate_codes, gate_gradient, gate_gradient_codes
from mochi_lora.engine.quantised import byte_product
from mochi_lora.engine.residual import added, added_and_normalised, norm, normalised
from mochi_lora.engine.rotary import joint_pair, rotate

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FP8 = pytest.mark.skipif(not (torch.cuda.is_available() and supports_fp8(CUDA)), reason="no fp8 products")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("heads", [(24, 128), (3, 32)], ids=str)
def test_queries_and_keys_are_the_formulas(heads: tuple[int, int], text: int, dtype: torch.dtype) -> None:
    """In bf16 the result's last bit may differ where a sum's order moves it; float32 gradients tell that the maths is right."""
    batch, visual = 2, 37
    made = [normal(batch, size, *heads, seed=seed).to(CUDA, dtype) for seed, size in enumerate((visual, visual, text, text))]
    inputs = [tensor.requires_grad_() for tensor in made]
    norms = [MochiRMSNorm(heads[1], 1e-5).to(CUDA).requires_grad_(requires_grad=False) for _ in range(2)]
    for seed, head_norm in enumerate(norms):
        head_norm.weight.data += 0.1 * normal(heads[1], seed=10 + seed).to(CUDA)
    angles = normal(visual, heads[0], heads[1] // 2, seed=20).to(CUDA)
    rotary = (angles.cos(), angles.sin())
    pairs = zip(inputs[:2], inputs[2:], norms, strict=True)
    exact = [torch.cat([rotate(head_norm(x), *rotary), words], dim=1) for x, words, head_norm in pairs]
    found = joint_pair(*inputs, norms[0].weight, norms[1].weight, *rotary, 1e-5)
    gradients = [normal(*tensor.shape, seed=30 + seed).to(CUDA, dtype) for seed, tensor in enumerate(exact)]
    bar = 1e-6 if dtype == torch.float32 else 1e-4
    for mine, true in zip(found, exact, strict=True):
        assert relative(mine.detach().cpu(), true.detach().cpu()) < bar
        assert torch.equal(mine[:, visual:], true[:, visual:])
    bar = 1e-5 if dtype == torch.float32 else 5e-3
    wanted = torch.autograd.grad(exact, inputs, gradients)
    for mine, true in zip(torch.autograd.grad(found, inputs, gradients), wanted, strict=True):
        assert mine.numel() == 0 or relative(mine.cpu(), true.cpu()) < bar


@DTYPES
def test_the_gates_gradient_is_the_formulas(dtype: torch.dtype) -> None:
    hidden = normal(5, 7, 2 * 4100).to(CUDA, dtype).requires_grad_()
    above = normal(5, 7, 4100, seed=1).to(CUDA, dtype)
    (exact,) = torch.autograd.grad(gate(hidden), hidden, above)
    assert relative(gate_gradient(above, hidden.detach()).cpu(), exact.cpu()) < (1e-6 if dtype == torch.float32 else 5e-3)


@FP8
def test_codes_of_the_gates_gradient_are_those_of_its_rows() -> None:
    hidden, above = normal(64, 2 * 8192).to(CUDA).bfloat16(), normal(64, 8192, seed=1).to(CUDA).bfloat16()
    factors = normal(2 * 8192, seed=2).to(CUDA).abs()
    codes, scale = gate_gradient_codes(above, hidden, factors)
    exact, exact_scale = quantise_rows(gate_gradient(above.float(), hidden.float()) * factors)
    torch.testing.assert_close(scale, exact_scale, rtol=1e-6, atol=0)
    assert (codes.float() != exact.float()).float().mean() < 1e-3


@FP8
@pytest.mark.parametrize("shape", [(1, 3072), (1000, 3072), (7, 48)], ids=str)
def test_codes_of_rows_times_factors_are_the_formulas(shape: tuple[int, int]) -> None:
    values, factors = normal(*shape).to(CUDA).bfloat16(), normal(shape[1], seed=1).to(CUDA).abs()
    for given, product, bar in ((factors, values * factors, 1e-3), (None, values, 5e-3)):  # bf16 alone lies halfway more often
        codes, scale = row_codes(values, given)
        exact, exact_scale = quantise_rows(product)
        torch.testing.assert_close(scale, exact_scale, rtol=1e-6, atol=0)
        assert (codes.float() != exact.float()).float().mean() < bar


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(11_130, 3072, 16), (70, 136, 48), (3, 48, 1), (33, 1536, 64)], ids=str)
def test_the_sum_with_an_adapters_product_is_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """But for the last bit of a few, where the float32 sum lies halfway."""
    rows, size, rank = shape
    made = [normal(*sides, seed=seed) for seed, sides in enumerate(((rows, size), (rows, rank), (size, rank)))]
    base, low, up = (tensor.to(CUDA, dtype) for tensor in made)
    exact = (base.double() + low.double() @ up.double().t()).to(dtype)
    found = low_rank_sum(base, low, up)
    assert (found != exact).float().mean() < 5e-3
    assert relative(found.cpu(), exact.cpu()) < 1e-3


def test_adapted_linears_are_no_further_from_the_exact_gradients_than_peft() -> None:
    layers = nn.ModuleDict({name: nn.Linear(96, 64) for name in ("to_q", "to_k", "to_v")})
    inject_adapter_in_model(LoraConfig(r=5, lora_alpha=7, target_modules=["to_q", "to_v"], init_lora_weights=False), layers)
    layers.to(CUDA)

    def gradients(made: nn.ModuleDict, run: Callable[[list[nn.Module], torch.Tensor], list[torch.Tensor]]) -> torch.Tensor:
        x = normal(2, 70, 96).to(next(made.parameters())).requires_grad_()
        trained = [x, *(parameter for name, parameter in made.named_parameters() if "lora_" in name)]
        loss = sum(part.double().square().sum() for part in run(list(made.values()), x))
        return torch.cat([part.double().flatten() for part in torch.autograd.grad(loss, trained)])

    def peft(made: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in made]

    exact = gradients(deepcopy(layers).double(), peft)
    with torch.autocast("cuda", torch.bfloat16):
        mistakes = [(gradients(layers, run) - exact).norm().item() for run in (project, peft)]
    assert mistakes[0] < 1.2 * mistakes[1] < 0.05 * exact.norm().item()


@pytest.mark.parametrize("shape", [(1, 3072, 12_288), (3, 100, 10), (1, 3072, 6_144)], ids=str)
def test_bytes_times_a_vector_are_the_formula(shape: tuple[int, int, int]) -> None:
    samples, size, outputs = shape
    x, scale = normal(samples, size).to(CUDA).bfloat16(), normal(outputs, seed=1).to(CUDA).abs()
    weight = (50 * normal(outputs, size, seed=2)).round().clamp(-127, 127).to(CUDA, torch.int8)
    exact = x.double() @ weight.double().t() * scale
    assert relative(byte_product(x, weight, scale).cpu(), exact.cpu()) < 1e-6


@FP8
@pytest.mark.parametrize("shape", [(1, 8192), (1000, 8192), (7, 48)], ids=str)
def test_codes_of_the_gate_are_those_of_its_rows(shape: tuple[int, int]) -> None:
    hidden = normal(shape[0], 2 * shape[1]).to(CUDA).bfloat16()
    codes, scale = gate_codes(hidden)
    exact, exact_scale = quantise_rows(gate(hidden.float()))
    torch.testing.assert_close(scale, exact_scale, rtol=1e-6, atol=0)
    assert (codes.float() != exact.float()).float().mean() < 1e-3


@FP8
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_fp8_feed_forward_layer_is_its_parts_one_after_another(*, compiled: bool) -> None:
    layer = GatedFeedForward(nn.ModuleList([GatedProjection(linear(256, 1024)), nn.Dropout(0.0), linear(512, 256)]))
    x = normal(3, 50, 256, seed=1).to(CUDA).bfloat16().requires_grad_()
    above = normal(3, 50, 256, seed=2).to(CUDA).bfloat16()
    exact = layer.net[2](gate(layer.net[0].proj(x)))
    found = (torch.compile(layer) if compiled else layer)(x)
    assert relative(found.detach().cpu(), exact.detach().cpu()) < 2e-2
    mine, true = (torch.autograd.grad(result, x, above)[0].cpu() for result in (found, exact))
    assert relative(mine, true) < 2e-2


@DTYPES
@pytest.mark.parametrize("width", [3072, 1536, 48])
def test_the_residual_streams_kernels_are_the_formulas(width: int, dtype: torch.dtype) -> None:
    """Three uses of one kernel and of its way back; in bf16 gradients differ by what the formula rounds in between."""
    x, y = (normal(2, 33, width, seed=seed).to(CUDA, dtype).requires_grad_() for seed in (1, 2))
    gate, factor = normal(2, width, seed=3).tanh().to(CUDA), (1 + 0.3 * normal(2, width, seed=4)).to(CUDA)
    exact = x + norm(y, gate, 1e-6)
    for found, wanted, inputs in (
        (normalised(x, factor, 1e-6, coded=False), (x * 1, norm(x, factor, 1e-6)), [x]),
        ((added(x, y, gate, 1e-6),), (exact,), [x, y]),
        (added_and_normalised(x, y, gate, factor, 1e-6, coded=False), (exact, norm(exact, factor, 1e-6)), [x, y]),
    ):
        bar = 1e-6 if dtype == torch.float32 else 1e-3
        for mine, true in zip(found, wanted, strict=True):
            assert relative(mine.detach().cpu(), true.detach().cpu()) < bar
        above = [normal(*made.shape, seed=10 + seed).to(made) for seed, made in enumerate(found)]
        bar = 1e-5 if dtype == torch.float32 else 5e-3
        truth = torch.autograd.grad(wanted, inputs, above, retain_graph=True)
        for mine, true in zip(torch.autograd.grad(found, inputs, above), truth, strict=True):
            assert relative(mine.cpu(), true.cpu()) < bar


@FP8
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_codes_from_the_norm_are_those_of_its_values(*, compiled: bool) -> None:
    x, factor = normal(2, 500, 3072).to(CUDA).bfloat16(), 1 + normal(2, 3072, seed=1).to(CUDA) / 4
    run = torch.compile(normalised, fullgraph=True) if compiled else normalised
    _, (values, codes, scale) = run(x, factor, 1e-6, coded=True)
    right, right_scale = quantise_rows(values.flatten(0, 1))
    torch.testing.assert_close(scale, right_scale, rtol=1e-6, atol=0)
    assert (codes.float() != right.float()).float().mean() < 1e-3


def linear(inputs: int, outputs: int) -> Fp8Linear:
    made = Fp8Linear(inputs, outputs, bias=False)
    made.quantise((normal(outputs, inputs) / 16).to(CUDA))
    return made

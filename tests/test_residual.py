"""The residual stream: the formula is diffusers', and what stands around the kernels hands them the right things."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_mochi import MochiModulatedRMSNorm
from engine_blocks import Step, step, streams, transformer, wrapped
from inputs import normal, relative, velocity
from kernels_by_formula import kernels, residual_norm  # noqa: F401 - a fixture

from mochi_lora.engine.fp8 import Coded, quantise_rows
from mochi_lora.engine.residual import added, added_and_normalised, norm, normalised

B, S, W = 2, 5, 48
EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def given(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, y, gate, factor."""
    x, y = (normal(B, S, W, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    return x, y, normal(B, W, seed=3).tanh(), 1 + 0.3 * normal(B, W, seed=4)


def gradients(results: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    above = [normal(*result.shape, seed=10 + seed).to(result.dtype) for seed, result in enumerate(results)]
    return list(torch.autograd.grad(results, inputs, above, retain_graph=True))


@DTYPES
def test_the_norm_is_diffusers(dtype: torch.dtype) -> None:
    x, _, gate, factor = given(dtype)
    for scale in (gate.to(dtype), factor):
        assert torch.equal(norm(x, scale.float(), EPS), MochiModulatedRMSNorm(EPS)(x, scale.unsqueeze(1)))


@DTYPES
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.usefixtures("kernels")
def test_what_comes_from_the_kernels_and_back_is_the_formulas(dtype: torch.dtype, *, coded: bool) -> None:
    """All three of them, values and gradients; float32 within the kernel, so that bf16 gradients differ by a rounding."""
    x, y, gate, factor = given(dtype)
    bar = 1e-6 if dtype == torch.float32 else 5e-3
    exact = x + norm(y, gate, EPS)
    for found, wanted, inputs in (
        (normalised(x, factor, EPS, coded=coded), (x * 1, norm(x, factor, EPS)), [x]),
        ((added(x, y, gate, EPS),), (exact,), [x, y]),
        (added_and_normalised(x, y, gate, factor, EPS, coded=coded), (exact, norm(exact, factor, EPS)), [x, y]),
    ):
        values = [made.values if isinstance(made, Coded) else made for made in found]
        for mine, true in zip(values, wanted, strict=True):
            assert torch.equal(mine, true)
        for mine, true in zip(gradients(values, inputs), gradients(list(wanted), inputs), strict=True):
            assert relative(mine, true) < bar
        codes = [made for made in found if isinstance(made, Coded)]
        assert len(codes) == (coded and len(found) == 2)
        for made in codes:
            right, scale = quantise_rows(values[1].flatten(0, 1))
            assert torch.equal(made.codes.float(), right.float())
            assert torch.equal(made.scale, scale)
            assert not made.codes.requires_grad


@pytest.mark.usefixtures("kernels")
def test_a_result_that_nobody_reads_has_no_part_in_the_gradient() -> None:
    x, y, gate, factor = given(torch.float32)
    total, normed = added_and_normalised(x, y, gate, factor, EPS, coded=False)
    exact = x + norm(y, gate, EPS)
    for mine, true in ((total, exact), (normed, norm(exact, factor, EPS))):
        for found, wanted in zip(gradients([mine], [x, y]), gradients([true], [x, y]), strict=True):
            assert relative(found, wanted) < 1e-6


def test_where_the_modulation_is_trained_the_formula_gives_its_gradient(kernels) -> None:  # noqa: F811
    x, y, gate, _ = given(torch.float32)
    gate.requires_grad_()
    added(x, y, gate, EPS).sum().backward()
    assert gate.grad is not None
    assert kernels.residual_norm.programs == []


def one_step(*, compile: bool, lengths: tuple[int, ...]) -> Step:  # noqa: A002 - the plan's name
    made = transformer(2)
    return step(made, wrapped(made, compile=compile), streams(9, lengths))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_with_the_kernels_give_the_gradients_of_blocks_without(kernels, monkeypatch, *, compile: bool) -> None:  # noqa: A002, F811
    torch._dynamo.reset()
    monkeypatch.setattr("mochi_lora.engine.compiled.BACKEND", "aot_eager")
    lengths = (5, 3)
    found = one_step(compile=compile, lengths=lengths)
    tokens = [2 * 9, 2 * 5]
    # Two norms at the beginning and two sums after attention and after the feed-forward; the last block leaves its text alone.
    assert sorted(set(kernels.residual_norm.programs)) == sorted(set(tokens))
    assert kernels.low_rank_sum.programs
    if not compile:
        assert len(kernels.low_rank_sum.programs) == 8 + 6, "q, k, v, out of two streams; the last text is not gone on with"
        assert len(kernels.residual_norm.programs) == 6 + 4
        assert len(kernels.residual_norm_gradient.programs) == 6 + 4 - 2, "the streams that enter need no gradient"
    monkeypatch.undo()
    torch._dynamo.reset()
    exact = one_step(compile=False, lengths=lengths)
    assert relative(found[0], exact[0]) < 1e-6
    assert found[1].keys() == exact[1].keys()
    for name, gradient in exact[1].items():
        assert relative(found[1][name], gradient) < 1e-5, name


def test_an_fp8_block_multiplies_the_codes_that_its_norms_wrote(kernels, load_tiny) -> None:  # noqa: F811
    model = load_tiny("fp8")
    found = velocity(model)
    layers = len(model.transformer.transformer_blocks)
    assert kernels.residual_norm.coded == 2 * layers + 2 * layers - 1, (
        "before attention and feed-forward; the last text has none"
    )
    assert len(kernels.byte_product.programs) == 2 * layers, "the modulation of both streams"
    kernels.residual_norm.formula = broken_codes
    assert not torch.equal(velocity(model), found)


def broken_codes(*tensors: Any, **how: Any) -> None:
    residual_norm(*tensors, **how)
    if how["CODES"]:
        tensors[6].zero_()

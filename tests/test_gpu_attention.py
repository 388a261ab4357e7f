"""On a CUDA device: every attention kernel against the formula, compiled and eager, without a wait, and the choice of one.

Run with `pytest -m gpu`. flash4 is skipped where its package or the GPU is missing.
"""

import pytest
import torch
import torch._dynamo.testing

from mochi_lora.engine import flash4
from mochi_lora.engine.attention import attend, check_attention, host_lengths
from mochi_lora.engine.kernel_choice import CANDIDATES, measure_kernels, resolve_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
KERNELS = [*CANDIDATES, "auto"]
H, D, BEFORE = 24, 128, 1000
LENGTHS = [(120, 120), (120, 47), (0, 256)]


def skip_without(kernel: str) -> None:
    if kernel == "flash4" and (reason := flash4.refusal(CUDA)) is not None:
        pytest.skip(reason)


def tokens(batch: int, size: int) -> list[torch.Tensor]:
    draw = torch.Generator(CUDA).manual_seed(size)
    made = [torch.randn(batch, size, H, D, device=CUDA, generator=draw, dtype=torch.bfloat16) for _ in range(4)]
    return [tensor.requires_grad_() for tensor in made[:3]] + made[3:]


def with_gradients(inputs: list[torch.Tensor], lengths: tuple[int, ...], kernel: str) -> list[torch.Tensor]:
    *qkv, grad = inputs
    result = attend(*qkv, lengths, kernel, before=BEFORE)
    return [result.detach(), *torch.autograd.grad(result, qkv, grad)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found.float() - exact.float()) / torch.linalg.vector_norm(exact.float()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_result_and_gradients_are_the_formulas_within_bf16(kernel, lengths):
    skip_without(kernel)
    inputs = tokens(2, BEFORE + max(lengths))
    for name, found, exact in zip(
        ("result", "dq", "dk", "dv"),
        with_gradients(inputs, lengths, kernel),
        with_gradients(inputs, lengths, "math"),
        strict=True,
    ):
        assert error(found, exact) < 1e-2, name
        for sample, length in enumerate(lengths):
            assert not found[sample, BEFORE + length :].any(), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_passes_the_check_on_mochis_heads(kernel):
    skip_without(kernel)
    check_attention(kernel, CUDA, torch.bfloat16, D, H)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_that_is_not_contiguous_is_taken_as_what_it_is(kernel):
    """cuDNN's cached plan of the backward pass does not know the gradient's strides."""
    skip_without(kernel)
    *qkv, grad = tokens(1, 512)
    strided = grad.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    result = attend(*qkv, None, kernel)
    first = torch.autograd.grad(result, qkv, grad, retain_graph=True)
    for found, exact in zip(torch.autograd.grad(result, qkv, strided), first, strict=True):
        assert error(found, exact) < 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_caption_compiles_nothing_and_no_call_waits_for_the_device(kernel):
    skip_without(kernel)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda q, k, v, lengths: attend(q * 2, k, v, lengths, kernel, before=BEFORE), fullgraph=True, backend=counter
    )
    for number, lengths in enumerate(((120, 120), (64, 13), (256, 0), (3, 3))):
        *qkv, grad = tokens(2, BEFORE + max(lengths))
        for tensor in qkv:
            torch._dynamo.mark_dynamic(tensor, 1)
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first call loads and plans
        try:
            found = torch.autograd.grad(compiled(*qkv, host_lengths(lengths)), qkv, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        exact = torch.autograd.grad(attend(qkv[0] * 2, *qkv[1:], lengths, "math", before=BEFORE), qkv, grad)
        assert max(error(*pair) for pair in zip(found, exact, strict=True)) < 1e-2
    assert counter.frame_count == 1


def test_auto_is_settled_by_what_was_measured():
    shape = (1, 4096, H, D)
    chosen = resolve_attention("auto", CUDA, torch.bfloat16, shape)
    rows = {row.attention: row for row in measure_kernels(CUDA, torch.bfloat16, shape, CANDIDATES)}
    assert rows[chosen].refused is None
    assert rows[chosen].total_ms < 1.5 * min(row.total_ms for row in rows.values())  # a noisy second measurement

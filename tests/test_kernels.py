"""The attention operator as compilers and checkpointing see it, FlashAttention-4 through a stand-in, the choice of a kernel."""

import re
import sys
import types

import pytest
import torch
from inputs import normal
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from mochi_lora.engine import flash4, kernel_choice, kernels
from mochi_lora.engine.attention import attend, check_attention, host_lengths
from mochi_lora.engine.kernel_choice import KernelTime, measure_kernels, resolve_attention
from mochi_lora.engine.kernels import ATTENTION_OPS
from mochi_lora.errors import UserError, install_command

CPU = torch.device("cpu")
B, S, H, D = 3, 12, 2, 8
BEFORE = 5  # of the tokens, visual
LENGTHS = [(7, 7, 7), (7, 2, 2), (0, 3, 0), (0, 0, 0)]


def qkv(size: int = S, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [normal(B, size, H, D, seed=seed).to(dtype).requires_grad_() for seed in (1, 2, 3)]


def with_gradients(inputs: list[torch.Tensor], lengths: tuple[int, ...], kernel: str) -> list[torch.Tensor]:
    result = attend(*inputs, lengths, kernel, before=BEFORE)
    return [result.detach(), *torch.autograd.grad(result, inputs, normal(*result.shape, seed=4).to(result.dtype))]


@pytest.fixture
def stand_in(monkeypatch) -> list[str]:
    """A `flash_attn.cute.interface` that computes by the formula; the list says which half was called."""
    calls = []

    def forward(q, k, v, **options):
        assert options == {"return_lse": True}
        calls.append("forward")
        out, lse = kernels._math_forward(*(tensor.transpose(1, 2) for tensor in (q, k, v)))
        return out.transpose(1, 2).contiguous(), lse.contiguous(), None, None, None

    def backward(q, k, v, out, dout, lse, **options):
        assert options == {"deterministic": torch.are_deterministic_algorithms_enabled()}
        assert out.is_contiguous()
        assert dout.is_contiguous()
        assert lse.is_contiguous()
        calls.append("backward")
        grads = kernels._math_backward(*(tensor.transpose(1, 2) for tensor in (dout, q, k, v, out)), lse)
        return tuple(grad.transpose(1, 2) for grad in grads)

    install(monkeypatch, _flash_attn_fwd=forward, _flash_attn_bwd=backward)
    return calls


def install(monkeypatch, **names) -> None:
    for name in ("cutlass", "flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["flash_attn.cute.interface"]).update(names)
    monkeypatch.setattr(flash4, "_halves", flash4._halves.__wrapped__)  # without its cache


@pytest.mark.parametrize("kernel", ["auto", "flash", "math", "flash4"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_are_those_of_torchs_attention_sample_by_sample(kernel: str, lengths: tuple[int, ...], stand_in) -> None:
    inputs = qkv()
    found = with_gradients(inputs, lengths, kernel)
    expected = [torch.zeros_like(tensor) for tensor in found]
    for sample, length in enumerate(lengths):
        valid = (slice(sample, sample + 1), slice(BEFORE + length))
        q, k, v = (tensor[valid].transpose(1, 2) for tensor in inputs)
        result = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        grads = torch.autograd.grad(result, inputs, normal(B, S, H, D, seed=4)[valid])
        expected[0][valid] = result.detach()
        for whole, grad in zip(expected[1:], grads, strict=True):
            whole.add_(grad)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["auto", "flash", "math", "flash4"])
@pytest.mark.parametrize("lengths", LENGTHS[:3])
def test_the_operator_is_registered_as_torch_wants_it(kernel: str, lengths: tuple[int, ...], stand_in) -> None:
    """Schema, autograd, fake tensors against real ones, and tracing with dynamic sizes."""
    torch.library.opcheck(kernels.attention, (*qkv(), host_lengths(lengths), BEFORE, kernel))


@pytest.mark.parametrize("kernel", ["auto", "flash4"])
def test_another_caption_compiles_nothing(kernel: str, stand_in) -> None:
    """One graph without a break for every text length, mix of lengths and null prompt; `aot_eager` traces the backward too."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, lengths: attend(q * 2, k, v, lengths, kernel, before=BEFORE), fullgraph=True, backend=counter
    )
    for size, lengths in ((12, (7, 7, 7)), (30, (25, 1, 9)), (7, (0, 0, 0)), (9, (4, 4, 4))):
        inputs = qkv(size)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 1)
        result = compiled(*inputs, host_lengths(lengths))
        mine = torch.autograd.grad(result.square().sum(), inputs)
        exact = attend(inputs[0] * 2, *inputs[1:], lengths, kernel, before=BEFORE)
        torch.testing.assert_close(result, exact)
        torch.testing.assert_close(mine, torch.autograd.grad(exact.square().sum(), inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernel", ["auto", "flash4"])
def test_a_policy_that_keeps_the_attention_spares_its_second_run(kernel: str, stand_in, monkeypatch) -> None:
    ran = []
    forward = kernels._forward
    monkeypatch.setattr(kernels, "_forward", lambda *arguments: ran.append(arguments[0]) or forward(*arguments))

    def policy(_, operation, *arguments, **options):
        return CheckpointPolicy.MUST_SAVE if operation in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    inputs = qkv()
    grads = []
    for options in ({}, {"context_fn": contexts}):
        ran.clear()
        result = checkpoint(lambda *x: attend(*x, None, kernel).square(), *inputs, use_reentrant=False, **options)
        grads.append(torch.autograd.grad(result.sum(), inputs))
        assert ran == [kernel] * (1 if options else 2)
    torch.testing.assert_close(*grads, atol=0, rtol=0)


def test_partitioners_are_told_the_price() -> None:
    inputs = qkv()
    with FlopCounterMode(display=False) as counter:
        attend(*inputs, None).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * B * H * S * S * D


@pytest.mark.parametrize("kernel", ["flash", "math", "flash4"])
def test_bf16_comes_back_as_bf16_and_close_to_float32(kernel: str, stand_in) -> None:
    found = with_gradients(qkv(dtype=torch.bfloat16), (7, 2, 2), kernel)
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    for mine, exact in zip(found, with_gradients(qkv(), (7, 2, 2), "math"), strict=True):
        assert torch.linalg.vector_norm(mine.float() - exact) < 2e-2 * torch.linalg.vector_norm(exact)


def test_lengths_beyond_the_tokens_are_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="13 valid tokens in 12"):
        attend(*qkv(), (7, 8, 7), before=BEFORE)
    with pytest.raises(AssertionError, match="2 lengths for 3 samples"):
        attend(*qkv(), (7, 7), before=BEFORE)


def test_neighbours_of_one_length_share_a_call(stand_in) -> None:
    attend(*qkv(), (7, 2, 2), "flash4", before=BEFORE).sum().backward()
    assert stand_in == ["forward", "forward", "backward", "backward"]


def test_flash4_passes_the_check_and_a_deterministic_torch_is_obeyed(stand_in) -> None:
    torch.use_deterministic_algorithms(mode=True)
    try:
        check_attention("flash4", CPU, torch.float32, 32)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert "backward" in stand_in


def test_flash4_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(flash4, "_halves", flash4._halves.__wrapped__)
    with pytest.raises(
        UserError, match=rf"flash4 needs the package flash-attn-4.*{re.escape(install_command('flash4'))}.*auto"
    ):
        check_attention("flash4", CPU, torch.float32, 32)


def test_a_flash4_with_other_names_inside_is_refused_by_version(monkeypatch) -> None:
    install(monkeypatch)
    with pytest.raises(UserError, match=r"written for flash-attn-4 4\.0\.0b36, this one differs \(.*_flash_attn_fwd"):
        check_attention("flash4", CPU, torch.float32, 32)


def test_cutlass_is_found_where_path_files_are_not_read(monkeypatch, tmp_path) -> None:
    """As with `pip install --target`: the folder is on PYTHONPATH, the .pth file in it is not read."""
    package = tmp_path / "nvidia_cutlass_dsl" / "dsl_packages" / "cutlass"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    flash4._find_cutlass()
    assert sys.path[-1] == str(package.parent)


@pytest.mark.parametrize(
    ("capability", "reason"), [((8, 0), "this GPU has 8.0"), ((12, 0), "this GPU has 12.0"), ((9, 0), None), ((10, 0), None)]
)
def test_flash4_is_for_hopper_and_blackwell(capability, reason, stand_in, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    refusal = flash4.refusal(torch.device("cuda"))
    assert refusal is None if reason is None else reason in refusal


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch) -> None:
    """Finite and of the right shape is not enough: a wrong scale would train."""

    def louder(q, k, v):
        return forward(q * 1.5, k, v)

    forward = kernels._flash_forward
    monkeypatch.setitem(kernels._TORCH, "flash", (louder, kernels._flash_backward))
    with pytest.raises(UserError, match=r"engine\.attention: flash is wrong on this cpu: its result is \d+\.\d% off"):
        check_attention("flash", CPU, torch.float32, 32)


SHAPE = (1, 300, H, 32)


def test_measuring_gives_times_or_the_reason_for_none() -> None:
    flash, four, cudnn = measure_kernels(CPU, torch.float32, SHAPE, ("flash", "flash4", "cudnn"))
    assert flash.refused is None
    assert 0 < flash.forward_ms < flash.total_ms < float("inf")
    assert "not on cpu" in four.refused
    assert cudnn.refused.startswith("does not run on this cpu (")
    assert four.total_ms == cudnn.total_ms == float("inf")


def test_on_a_cpu_auto_stays_torchs_own_choice_and_a_name_is_checked() -> None:
    assert resolve_attention("auto", CPU, torch.float32, SHAPE) == "auto"
    assert resolve_attention("math", CPU, torch.float32, SHAPE) == "math"
    with pytest.raises(UserError, match="cudnn does not run on this cpu"):
        resolve_attention("cudnn", CPU, torch.float32, SHAPE)


@pytest.fixture
def gpu(monkeypatch):
    """Settles `auto` for a GPU of which only the measured times are known; gives (resolve, times, calls)."""
    rows, calls = [], []

    def measured(*arguments):
        calls.append(arguments)
        return rows

    monkeypatch.setattr(kernel_choice, "measure_kernels", measured)
    kernel_choice._fastest.cache_clear()
    yield lambda shape=SHAPE: resolve_attention("auto", torch.device("cuda"), torch.bfloat16, shape), rows, calls
    kernel_choice._fastest.cache_clear()


def test_auto_on_a_gpu_names_the_fastest_kernel_and_prints_what_was_measured(gpu, capsys) -> None:
    resolve, rows, calls = gpu
    rows += [KernelTime("flash4", refused="it is not installed"), KernelTime("cudnn", 2.0, 5.0), KernelTime("flash", 1.9, 6.0)]
    assert resolve() == "cudnn"
    printed = " ".join(capsys.readouterr().out.split())
    assert "flash4 not used (it is not installed), cudnn 2.00 + 5.00 ms, flash 1.90 + 6.00 ms" in printed
    assert resolve() == "cudnn"
    assert len(calls) == 1
    resolve((1, 600, H, 32))
    assert len(calls) == 2


def test_auto_without_any_kernel_of_use_says_so(gpu) -> None:
    resolve, rows, _ = gpu
    rows.append(KernelTime("flash", refused="its gradients are not finite"))
    with pytest.raises(UserError, match="auto found no kernel that runs on"):
        resolve()


def test_a_kernel_whose_gradient_overflows_on_the_runs_shape_is_not_used(monkeypatch) -> None:
    """The small check passes, the shape of the run does not."""

    def overflowing(grad, q, k, v, out, lse):
        dq, dk, dv = backward(grad, q, k, v, out, lse)
        return (dq * float("inf") if q.shape[2] == SHAPE[1] else dq), dk, dv

    backward = kernels._flash_backward
    monkeypatch.setitem(kernels._TORCH, "flash", (kernels._flash_forward, overflowing))
    (row,) = measure_kernels(CPU, torch.float32, SHAPE, ("flash",))
    assert row.refused == "its gradients are not finite"


@pytest.mark.parametrize("place", ["attention_refusal", "random_tokens"])
def test_a_full_gpu_is_no_fault_of_the_kernels(place, monkeypatch) -> None:
    """Memory that is out is a RuntimeError as well; `math`, which needs the most, would be no way out."""

    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel_choice, place, full)
    monkeypatch.setattr(kernel_choice, "CANDIDATES", ("flash", "math"))
    assert [row.refused for row in measure_kernels(CPU, torch.float32, SHAPE, ("flash",))] == ["the GPU's memory was out"]
    kernel_choice._fastest.cache_clear()
    with pytest.raises(UserError, match="the GPU's memory is too full to try a kernel on"):
        kernel_choice._fastest(CPU, torch.float32, SHAPE)


def test_the_check_of_a_kernel_lets_a_full_gpu_through(monkeypatch) -> None:
    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mochi_lora.engine.attention._with_gradients", full)
    with pytest.raises(torch.OutOfMemoryError):
        check_attention("flash", CPU, torch.float32, 32)

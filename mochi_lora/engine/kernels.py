"""Every attention kernel behind one operator, `mochi_lora::attention`, which compilers and checkpointing see as one node.

Shape legend: B = samples, S = tokens (visual first, text last, padding after it), H = heads, D = head size.

The operator gets the valid lengths as a tensor on the host. A graph does not guard on a tensor's values, so a caption of
another length compiles nothing anew, and reading it waits for no device. Inside, samples are cut to their length: no kernel
sees padding or a mask. What a cut costs: nothing where all tokens are valid; otherwise a call for each run of neighbours of
one length (at Mochi's sizes one sample fills a GPU), and the result and its gradients are zeroed and copied once.

torch's kernels are called by their two halves, as `torch.nn.attention.varlen` calls flash: `scaled_dot_product_attention`
would choose by its own flags, and its shapes would stand in the graph. Dropout is always 0: random states are not read.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import register_flop_formula

from mochi_lora.engine import flash4

Attention = Literal["auto", "cudnn", "flash4", "flash", "efficient", "math"]
HALF_ONLY: frozenset[Attention] = frozenset(("cudnn", "flash4", "flash"))  # on a GPU these take no float32
Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]
Backward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Triple]

_LSE_ALIGNMENT = 32  # the memory-efficient kernel wants rows of its logsumexp in whole blocks
aten = torch.ops.aten


def _efficient_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pair:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, compute_log_sumexp=True)
    return out, lse[..., : q.shape[2]]


def _efficient_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> Triple:
    lse = F.pad(lse, (0, -lse.shape[2] % _LSE_ALIGNMENT), value=torch.inf)  # as its forward does: exp(score - inf) is 0
    state = torch.empty((), dtype=torch.int64, device=q.device)
    wanted = [True, True, True, False]  # no bias
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse, state, state, 0.0, wanted
    )
    return dq, dk, dv


def _cudnn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pair:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, compute_log_sumexp=True)
    return out, lse.reshape(lse.shape[:3])


@lru_cache(maxsize=1)
def _cudnn_lse_rank(device: torch.device) -> int:
    """[B, H, S] or [B, H, S, 1]: what cuDNN's forward returns differs between versions of torch, and its meta function errs."""
    q = torch.zeros(1, 1, 128, 128, dtype=torch.bfloat16, device=device)
    return aten._scaled_dot_product_cudnn_attention(q, q, q, None, compute_log_sumexp=True)[1].dim()


def _cudnn_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> Triple:
    lse = lse.unsqueeze(-1) if _cudnn_lse_rank(q.device) == 4 else lse
    state = torch.empty((), dtype=torch.int64, device=q.device)
    size = q.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, state, state, None, None, None, size, size, 0.0, is_causal=False
    )


def _flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pair:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse


def _flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> Triple:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, is_causal=False)
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    random = {"dropout_p": 0.0, "is_causal": False, "philox_seed": state, "philox_offset": state}
    size = q.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, None, None, size, size, **random)


def _math_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pair:
    """Written out, in float32 at least. All S x S scores stand in memory, 11 GiB a copy at 37 frames of 480x848.

    Autocast reaches into an operator and would round both products to bf16; torch's fused kernels are on none of its lists.
    """
    q, k, wide = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ k.mT * q.shape[3] ** -0.5
        lse = scores.logsumexp(-1)
        return ((scores - lse.unsqueeze(-1)).exp() @ wide).to(v.dtype), lse


def _math_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> Triple:
    dtype, scale = q.dtype, q.shape[3] ** -0.5
    grad, q, k, v, out = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (grad, q, k, v, out))
    with torch.autocast(q.device.type, enabled=False):
        weights = (q @ k.mT * scale - lse.unsqueeze(-1)).exp()
        slopes = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
        return (slopes @ k).to(dtype), (slopes.mT @ q).to(dtype), (weights.mT @ grad).to(dtype)


# On [B, H, S, D]; flash4 alone wants [B, S, H, D].
_TORCH: dict[str, tuple[Forward, Backward]] = {
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "flash": (_flash_forward, _flash_backward),
    "efficient": (_efficient_forward, _efficient_backward),
    "math": (_math_forward, _math_backward),
}
_TORCH_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}


def _torch_choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """The kernel that `scaled_dot_product_attention` would take for [B, H, S, D]."""
    return _TORCH_NAMES[SDPBackend(torch._fused_sdp_choice(q, k, v))]


def _forward(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pair:
    """Attention of [B, S, H, D] without padding -> out [B, S, H, D], logsumexp [B, H, S]."""
    if kernel == "flash4":
        return flash4.forward(q, k, v)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse = _TORCH[_torch_choice(q, k, v) if kernel == "auto" else kernel][0](q, k, v)
    return out.transpose(1, 2), lse


def _backward(
    kernel: str,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v [B, S, H, D] without padding."""
    if kernel == "flash4":
        return flash4.backward(grad, q, k, v, out, lse)
    grad, q, k, v, out = (tensor.transpose(1, 2) for tensor in (grad, q, k, v, out))
    grads = _TORCH[_torch_choice(q, k, v) if kernel == "auto" else kernel][1](grad, q, k, v, out, lse)
    return tuple(tensor.transpose(1, 2) for tensor in grads)


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    batch, size, heads, _ = q.shape
    return q.new_empty(batch, heads, size, dtype=torch.promote_types(q.dtype, torch.float32))


def _cuts(lengths: list[int]) -> Iterator[tuple[slice, slice]]:
    """(samples, tokens) of each run of neighbours of one length: sorting a batch by length pays. Length 0 has nothing to do."""
    start = 0
    for length, run in groupby(lengths):
        stop = start + len(list(run))
        if length:
            yield slice(start, stop), slice(length)
        start = stop


def _valid(lengths: torch.Tensor, before: int, q: torch.Tensor) -> list[int]:
    assert lengths.device.type == "cpu", "lengths on a device would be waited for"
    valid = [before + length for length in lengths.tolist()]
    assert len(valid) == q.shape[0], f"{len(valid)} lengths for {q.shape[0]} samples"
    assert max(valid) <= q.shape[1], f"a sample of {max(valid)} valid tokens in {q.shape[1]}"
    return valid


@torch.library.custom_op("mochi_lora::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, before: int, kernel: str) -> Pair:
    """q, k, v [B, S, H, D], lengths int64 [B] on the host -> out [B, S, H, D] contiguous, logsumexp [B, H, S].

    `before` tokens are always valid (the visual ones) and `lengths` count from there; their sum is made here, for in a graph
    it would be a CPU kernel that inductor compiles with a C++ compiler.
    The logsumexp is float32 at least. Rows of padding are zero. Raises RuntimeError where the kernel refuses, UserError
    where flash4 is not installed.
    """
    valid = _valid(lengths, before, q)
    if min(valid) == q.shape[1]:
        out, lse = _forward(kernel, q, k, v)
        return out.contiguous(), lse.contiguous()
    out, lse = q.new_zeros(q.shape), _empty_lse(q).zero_()
    for samples, tokens in _cuts(valid):
        cut = (samples, tokens)
        out[cut], lse[samples, :, tokens] = _forward(kernel, q[cut], k[cut], v[cut])
    return out, lse


@attention.register_fake
def _attention_fake(q: torch.Tensor, *_: object) -> Pair:
    return q.new_empty(q.shape), _empty_lse(q)


@torch.library.custom_op("mochi_lora::attention_backward", mutates_args=())
def attention_backward(  # noqa: PLR0913, PLR0917 - an operator takes no dataclass
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    before: int,
    kernel: str,
) -> Triple:
    """Gradients of q, k, v [B, S, H, D], contiguous; zero on padding."""
    # cuDNN's cache of backward plans does not know the gradient's strides: they must never change.
    grad = grad.contiguous()
    valid = _valid(lengths, before, q)
    if min(valid) == q.shape[1]:
        dq, dk, dv = _backward(kernel, grad, q, k, v, out, lse)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    grads = (q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape))
    for samples, tokens in _cuts(valid):
        cut = (samples, tokens)
        inputs = (grad[cut].contiguous(), q[cut], k[cut], v[cut], out[cut].contiguous())
        for whole, part in zip(grads, _backward(kernel, *inputs, lse[samples, :, tokens].contiguous()), strict=True):
            whole[cut] = part
    return grads


@attention_backward.register_fake
def _attention_backward_fake(_: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: object) -> Triple:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:  # noqa: ANN401 - torch's own signature
    q, k, v, lengths, ctx.before, ctx.kernel = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, lengths, out, lse)


def _differentiate(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
    return *attention_backward(grad, *ctx.saved_tensors, ctx.before, ctx.kernel), None, None, None


attention.register_autograd(_differentiate, setup_context=_keep)

# What a checkpointing policy keeps: the operator's outputs are the attention and its logsumexp.
ATTENTION_OPS: tuple[torch._ops.OpOverload, ...] = (torch.ops.mochi_lora.attention.default,)


@register_flop_formula(torch.ops.mochi_lora.attention)
def _attention_flops(q_shape: tuple[int, ...], *_: object, **__: object) -> int:
    """Two products over S x S, padding counted, as torch counts its own kernels: partitioners price the operator by it."""
    batch, size, heads, width = q_shape
    return 4 * batch * heads * size * size * width


@register_flop_formula(torch.ops.mochi_lora.attention_backward)
def _attention_backward_flops(_: tuple[int, ...], q_shape: tuple[int, ...], *__: object, **___: object) -> int:
    """Five products: the scores again, and one for each of weights, q, k and v."""
    batch, size, heads, width = q_shape
    return 10 * batch * heads * size * size * width

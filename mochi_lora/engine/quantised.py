"""Frozen linears that hold their weight in fewer bits: what they share, and the two that multiply in bf16 (int8, nf4).

Shape legend: N = output features, K = input features, X = any leading dimensions.

bitsandbytes' own `Linear4bit` and `Linear8bitLt` keep half of their state outside parameters, so that weights cannot be
swapped out and back, cast activations to float16, and merge by rounding twice. The number formats here are theirs (tests
compare); a weight is decoded for each product, in the forward and again in the backward, and never kept decoded.
"""

from collections.abc import Callable, Mapping
from functools import cache
from math import ceil
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from mochi_lora.engine.hand_written import fused, has_kernels

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]

_INT8_LARGEST = 127
_NF4_BLOCK = 64  # weights per scale
_NESTED_BLOCK = 256  # scales per scale of scales
_FEW_ROWS = 64  # the weight is read once for each
_BYTE_ROWS = 4  # outputs of a byte linear that a program computes
_TINY = 1e-12  # a row of zeros has this for its largest value, so that no scale is zero


class QuantisedLinear(nn.Linear):
    """A frozen linear layer: `weight` is a code, which `decode` makes numbers of. Everything it holds is a parameter.

    The result is bf16 whatever comes in; the backward gives the gradient of the input alone.
    """

    # PEFT gives a new adapter this dtype; without it, that of the weight, which for fp8 would round the factors to 3 bits.
    compute_dtype = torch.bfloat16
    format: ClassVar[str]
    weight_scale: nn.Parameter

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        nn.Module.__init__(self)  # nn.Linear's own allocates a weight
        self.in_features, self.out_features = in_features, out_features
        for name, (shape, dtype) in self.spec().items():
            self.register_parameter(name, _frozen(torch.empty(shape, dtype=dtype, device="meta")))
        bias_shape = torch.empty(out_features, dtype=self.compute_dtype, device="meta")
        self.register_parameter("bias", _frozen(bias_shape) if bias else None)

    def spec(self) -> Spec:
        """Name -> (shape, dtype) of the tensors that stand for the weight, `weight` among them."""
        raise NotImplementedError

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of `spec` for `weight` [N, K] of any floating dtype, on its device."""
        raise NotImplementedError

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] that the stored tensors stand for."""
        raise NotImplementedError

    def quantise(self, weight: torch.Tensor, home: torch.device | None = None) -> None:
        """Take `weight` [N, K]: encoded on its own device, kept on `home` (None: where it is)."""
        self.place(self.encode(weight), home)

    def place(self, tensors: Mapping[str, torch.Tensor], home: torch.device | None = None) -> None:
        """Take tensors of `spec` as they are, some or all of them."""
        spec = self.spec()
        for name, tensor in tensors.items():
            assert (tuple(tensor.shape), tensor.dtype) == spec[name], f"{name}: {tensor.shape} {tensor.dtype}, not {spec[name]}"
            self.register_parameter(name, _frozen(tensor.to(home) if home else tensor))

    def dequantize(self) -> torch.Tensor:
        """The weight in float32. PEFT asks for it, where DoRA needs the norms, if there is a `W_q`."""
        return self.decode(torch.float32)

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802 - PEFT 0.21.2 knows quantised weights by this name
        """The code, which is not for multiplying."""
        return self.weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantisedLinear":  # noqa: FBT001, FBT002
        stored = self.weight.dtype
        super()._apply(fn, recurse)
        if (
            self.weight.dtype != stored
        ):  # `.to(dtype)`: fp8 counts as floating point, and codes without their scale mean nothing
            message = f"a weight held as {self.format} cannot be cast to {self.weight.dtype}; load it at another precision"
            raise TypeError(message)
        return self

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{super().extra_repr()}, format={self.format}"


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class WeightOnlyLinear(QuantisedLinear):
    """Products are bf16; the weight is decoded inside one opaque operator each time.

    Opaque, because torch.compile would otherwise share the decoded weight between forward and backward and keep it.
    """

    def scales(self) -> list[torch.Tensor]:
        """What the weight needs to be decoded, in the order of `spec`."""
        return [getattr(self, name) for name in self.spec() if name != "weight"]

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in `dtype`."""
        shape = [self.out_features, self.in_features]
        return _DECODERS[self.format](self.weight, self.scales(), shape, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """[X, K] -> [X, N] bf16."""
        shape = [self.out_features, self.in_features]
        x = input.to(self.compute_dtype)
        result = weight_only_product(x, self.weight, self.scales(), shape, self.format, transposed=False)
        return result if self.bias is None else result + self.bias


class Int8Linear(WeightOnlyLinear):
    """One byte per weight, one scale per output channel: LLM.int8's rows (bitsandbytes `int8_vectorwise_quant`)."""

    format = "int8"

    def spec(self) -> Spec:
        """Codes, and what a code of 1 stands for in each row."""
        return {
            "weight": ((self.out_features, self.in_features), torch.int8),
            "weight_scale": ((self.out_features,), torch.float32),
        }

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round to 1/127 of each row's largest value."""
        weight = weight.float()
        scale = weight.abs().amax(1).clamp(min=_TINY) / _INT8_LARGEST
        return {"weight": (weight / scale[:, None]).round().to(torch.int8), "weight_scale": scale}

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """[X, K] -> [X, N] bf16."""
        few = input.ndim == 2 and input.shape[0] <= _FEW_ROWS and not input.requires_grad
        if few and (has_kernels(input) or torch.compiler.is_compiling()):
            # One row per sample and nothing to differentiate, as in the modulation: the codes alone are read, where decoding
            # would write and read two bytes per weight besides.
            total = byte_product(input, self.weight, self.weight_scale)
            return (total if self.bias is None else total + self.bias).to(self.compute_dtype)
        return super().forward(input)


def byte_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [B, K] times (weight [N, K] int8 * scale [N]).T -> float32 [B, N]; B is small.

    torch.compile makes a kernel of the formula that reads an eighth of what an H200's memory could.
    """
    return byte_product_kernel(x, weight, scale) if has_kernels(x) else (x.float().unsqueeze(1) * weight).sum(-1) * scale


@torch.library.custom_op("mochi_lora::byte_product", mutates_args=())
def byte_product_kernel(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The kernel of `byte_product`."""
    (samples, size), outputs = x.shape, weight.shape[0]
    result = _byte_product_fake(x, weight, scale)
    grid = (fused.cdiv(outputs, _BYTE_ROWS), samples)
    fused.byte_product[grid](
        x.contiguous(), weight, scale, result, size, outputs, ROWS=_BYTE_ROWS, BLOCK=fused.power_of_two(size), num_warps=8
    )
    return result


@byte_product_kernel.register_fake
def _byte_product_fake(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale.new_empty(x.shape[0], weight.shape[0])


class Nf4Linear(WeightOnlyLinear):
    """Half a byte per weight and a scale per 64, itself held in a byte: QLoRA's NF4 with double quantisation.

    Source: Dettmers et al. 2023, arXiv 2305.14314; bitsandbytes 0.50.2 `quantize_4bit`. N * K must be even.
    """

    format = "nf4"

    def spec(self) -> Spec:
        """Two codes a byte, their scales, the scales' scales and mean."""
        blocks = ceil(self.out_features * self.in_features / _NF4_BLOCK)
        return {
            "weight": ((self.out_features, self.in_features // 2), torch.uint8),
            "weight_scale": ((blocks,), torch.uint8),
            "nested_scale": ((ceil(blocks / _NESTED_BLOCK),), torch.float32),
            "scale_mean": ((1,), torch.float32),
        }

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """bitsandbytes' own rounding, on the weight's device."""
        functional = _bitsandbytes()
        codes, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=_NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        assert state.state2.blocksize == _NESTED_BLOCK
        return {
            "weight": codes.reshape(self.out_features, self.in_features // 2),
            "weight_scale": state.absmax,
            "nested_scale": state.state2.absmax,
            "scale_mean": state.offset.reshape(1),
        }


def _decode_int8(weight: torch.Tensor, scales: list[torch.Tensor], shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    # `out` of another dtype: float32 arithmetic and one pass over memory.
    return torch.mul(weight, scales[0].unsqueeze(1), out=torch.empty(shape, dtype=dtype, device=weight.device))


def _decode_nf4(weight: torch.Tensor, scales: list[torch.Tensor], shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    functional = _bitsandbytes()
    codes, nested, mean = scales
    absmax = functional.dequantize_blockwise(
        codes, absmax=nested, code=_scale_codes(codes.device), blocksize=_NESTED_BLOCK, nested=False
    )
    state = functional.QuantState(absmax + mean, torch.Size(shape), None, _NF4_BLOCK, "nf4", dtype)
    return functional.dequantize_4bit(weight.reshape(-1, 1), state)


_DECODERS = {"int8": _decode_int8, "nf4": _decode_nf4}


@cache
def _bitsandbytes() -> Any:  # noqa: ANN401 - untyped module
    from bitsandbytes import functional  # noqa: PLC0415 - a second to import, for nf4 alone

    return functional


@cache
def _scale_codes(device: torch.device) -> torch.Tensor:
    """The 256 values that bitsandbytes' nested scales are rounded to."""
    return _bitsandbytes().create_dynamic_map().to(device)


@torch.library.custom_op("mochi_lora::weight_only_product", mutates_args=())
def weight_only_product(
    x: torch.Tensor, weight: torch.Tensor, scales: list[torch.Tensor], shape: list[int], form: str, *, transposed: bool
) -> torch.Tensor:
    """x [X, K] times the decoded weight's transpose -> [X, N]; `transposed`: x [X, N] times the weight -> [X, K].

    In x's dtype; `shape` is [N, K]. Differentiable once, in x.
    """
    decoded = _DECODERS[form](weight, scales, shape, x.dtype)
    return x @ decoded if transposed else F.linear(x, decoded)


@weight_only_product.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,  # noqa: ARG001 - one signature
    scales: list[torch.Tensor],  # noqa: ARG001
    shape: list[int],
    form: str,  # noqa: ARG001
    *,
    transposed: bool,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], shape[1] if transposed else shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: torch.Tensor) -> None:  # noqa: ANN401, ARG001
    assert not keyword_only_inputs["transposed"], "the gradient is not differentiable"
    _, weight, scales, ctx.shape, ctx.form = inputs
    ctx.save_for_backward(weight, *scales)


def _input_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # noqa: ANN401
    weight, *scales = ctx.saved_tensors
    product = weight_only_product(gradient, weight, scales, ctx.shape, ctx.form, transposed=True)
    return product, None, [None] * len(scales), None, None


weight_only_product.register_autograd(_input_gradient, setup_context=_keep)

"""A frozen linear multiplied in fp8, forward and for the input's gradient, from one copy of the weight.

Shape legend: M = rows (tokens), N = output features, K = input features.

e4m3 codes with one scale per output channel. Forward: the activations are quantised per row, the product's scales are
applied by the kernel. Backward: the weight's scales are folded into the gradient, which is quantised per row and multiplied
with the same codes. e4m3 for gradients too: with a scale per row its 2^-9 .. 448 is range enough, and the gradient is then
3.7 % off where e5m2 makes it 5.9 % (normal numbers, K = 3072).

Where there is no kernel, everything but the product is plain torch. The transposed copy that the backward product wants (fp8
kernels read both factors along K) is made in the backward pass and kept nowhere; an operator of our own around it would leave
it to torch's byte-wise copy instead of the compiler's kernel.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from mochi_lora.engine.hand_written import fused, has_kernels
from mochi_lora.engine.quantised import QuantisedLinear, Spec

CODES = torch.float8_e4m3fn
FP8_FROM = (8, 9)  # compute capability of the first GPUs that multiply such codes


class Coded(NamedTuple):
    """What several products read, quantised by who made it. Gradients flow to the values."""

    values: torch.Tensor  # [..., K]
    codes: torch.Tensor  # [M, K] e4m3
    scale: torch.Tensor  # [M, 1] float32


class Fp8Linear(QuantisedLinear):
    """The frozen linear. K and N must be multiples of 16, which the kernel wants; the number of rows is free."""

    format = "fp8"

    def spec(self) -> Spec:
        """Codes, and a scale per output channel."""
        return {
            "weight": ((self.out_features, self.in_features), CODES),
            "weight_scale": ((self.out_features,), torch.float32),
        }

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scaled so that each row's largest value is e4m3's."""
        codes, scale = quantise_rows(weight)
        return {"weight": codes, "weight_scale": scale.squeeze(1)}

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in `dtype`."""
        return (self.weight.float() * self.weight_scale.unsqueeze(1)).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """[..., K] -> [..., N] bf16."""
        return self.of(coded(input))

    def of(self, rows: Coded) -> torch.Tensor:
        """What `forward` makes of the values."""
        values = rows.values.reshape(-1, self.in_features)
        result = _Fp8Product.apply(values, rows.codes, rows.scale, self.weight, self.weight_scale, self.compute_dtype)
        result = result.reshape(*rows.values.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias


def coded(values: torch.Tensor) -> Coded:
    """`values` [..., K] with the codes of their rows."""
    return Coded(values, *scaled_codes(values.detach().reshape(-1, values.shape[-1]), None))


def values_of(rows: torch.Tensor | Coded) -> torch.Tensor:
    """The values, with codes beside them or without."""
    return rows.values if isinstance(rows, Coded) else rows


def through(layer: nn.Module, rows: torch.Tensor | Coded) -> torch.Tensor:
    """What `layer` makes of the values; by their codes if there are any and it multiplies codes."""
    return layer.of(rows) if isinstance(layer, Fp8Linear) and isinstance(rows, Coded) else layer(values_of(rows))


def quantise_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] of any floating dtype -> (codes [M, K] e4m3, scales [M, 1] float32): value = code * scale.

    A row with a non-finite value becomes NaN throughout, so that it is seen.
    """
    values = values.float()
    # Literals: with dynamic shapes torch.compile would make inputs of a module's float constants.
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(CODES).max
    return (values * scale.reciprocal()).to(CODES), scale  # a division for each value would take as long as moving them


def scaled_codes(values: torch.Tensor, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_rows` of `values` [M, K] times `factors` [K]; on a GPU by one kernel, which compilers fuse with nothing."""
    if not has_kernels(values):
        return quantise_rows(values if factors is None else values * factors)
    return row_codes(values, factors)


@torch.library.custom_op("mochi_lora::row_codes", mutates_args=())
def row_codes(values: torch.Tensor, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel of `scaled_codes`."""
    codes, scale = empty_codes(values)
    values, (rows, size) = values.contiguous(), values.shape
    fused.row_codes[(rows,)](
        values, values if factors is None else factors, codes, scale, size,
        FACTORS=factors is not None, BLOCK=fused.power_of_two(size), num_warps=8,
    )  # fmt: skip
    return codes, scale


@row_codes.register_fake
def _row_codes_fake(values: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_codes(values)


def empty_codes(values: torch.Tensor, columns: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the codes and scales of [M, K], K being `columns` or as in `values`."""
    shape = values.shape if columns is None else (values.shape[0], columns)
    return values.new_empty(shape, dtype=CODES), values.new_empty((values.shape[0], 1), dtype=torch.float32)


def product(
    left: torch.Tensor, left_scale: torch.Tensor, right: torch.Tensor, right_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(left [M, K] e4m3 * left_scale [M, 1]) @ (right [N, K] e4m3 * right_scale [N]).T -> [M, N] of `dtype`."""
    chosen = kernel_product if left.is_cuda else emulated_product
    return chosen(left, left_scale, right, right_scale, dtype)


def kernel_product(
    left: torch.Tensor, left_scale: torch.Tensor, right: torch.Tensor, right_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`product` by the device's fp8 kernel; `dtype` is bf16.

    With whole sums: Hopper's fast accumulation keeps fewer bits, is 2.2e-3 to 3.0e-3 off and saves an eighth of the product.
    """
    scale_b = right_scale.unsqueeze(0)
    return torch._scaled_mm(left, right.t(), scale_a=left_scale, scale_b=scale_b, out_dtype=dtype, use_fast_accum=False)


def emulated_product(
    left: torch.Tensor, left_scale: torch.Tensor, right: torch.Tensor, right_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`product` of the same codes by float32 arithmetic, for devices without fp8 products."""
    with torch.autocast(left.device.type, enabled=False):
        return (left.float() @ right.float().t() * left_scale * right_scale).to(dtype)


def input_gradient(codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of a linear's input, bf16 [M, K]: the quantised gradient [M, N], [M, 1] times `weight`'s codes [N, K]."""
    ones = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    return product(codes, scale, weight.t().contiguous(), ones, torch.bfloat16)  # all that the kernel writes


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor,  # noqa: ARG004 - gets the gradient
        codes: torch.Tensor,
        scale: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return product(codes, scale, weight, weight_scale, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ANN401, ARG004
        x, _, _, weight, weight_scale, _ = inputs
        ctx.save_for_backward(weight, weight_scale)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        weight, weight_scale = ctx.saved_tensors
        codes, scale = scaled_codes(gradients[0], weight_scale)
        return input_gradient(codes, scale, weight).to(ctx.dtype), None, None, None, None, None


def supports_fp8(device: torch.device) -> bool:
    """Whether the GPU multiplies e4m3 (compute capability 8.9 and up: Ada, Hopper, Blackwell)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_FROM

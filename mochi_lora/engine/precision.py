"""What each precision means: the dtype of every base tensor, which linears are quantised and how, which device can run it.

Of the 10.03 B parameters, the blocks' linears are 5.44 B on the visual tokens, 1.79 B on the text tokens and 2.70 B of
modulation; the rest (embeddings, norms, the last projection) stays bf16 at every quantised precision.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from mochi_lora.engine.fp8 import Fp8Linear, supports_fp8
from mochi_lora.engine.quantised import Int8Linear, Nf4Linear, QuantisedLinear
from mochi_lora.errors import UserError

Precision = Literal["bf16", "fp32", "fp8", "nf4", "int8"]
Part = Literal["visual", "text", "modulation"]
_KEEP_FP32 = ("pos_frequencies", "norm_q.", "norm_k.", "norm_added_q.", "norm_added_k.")
_PARTS: dict[Part, str] = {
    "visual": r"attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)",
    "text": r"attn1\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)|ff_context\.net\.(0\.proj|2)",
    "modulation": r"norm1(_context)?\.linear(_1)?",
}
# Modulation multiplies one row per sample: nothing to gain from fp8 products, and its gates and scales act on whole tokens,
# so it gets int8's 0.8 % error of a byte (e4m3: 2.6 %, nf4: 9 %) everywhere. A part left out stays bf16.
FORMATS: dict[Precision, dict[Part, type[QuantisedLinear]]] = {
    "bf16": {},
    "fp32": {},
    "fp8": {"visual": Fp8Linear, "text": Fp8Linear, "modulation": Int8Linear},
    "nf4": {"visual": Nf4Linear, "text": Nf4Linear, "modulation": Int8Linear},
    "int8": {"visual": Int8Linear, "text": Int8Linear, "modulation": Int8Linear},
}


def is_kept_float32(name: str) -> bool:
    """Whether Genmo keeps the base tensor of this diffusers name in float32 (genmoai/mochi#115)."""
    return any(part in name for part in _KEEP_FP32)


def compute_dtype(precision: Precision) -> torch.dtype:
    """Dtype of attention and of everything element-wise at `precision`; fp8 has matrix products of its own besides."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def weight_dtype(name: str, precision: Precision) -> torch.dtype:
    """Dtype of one base tensor at `precision`, before any quantisation: Genmo's list stays float32."""
    return torch.float32 if is_kept_float32(name) else compute_dtype(precision)


def part_of(module: str) -> Part | None:
    """Which part of the blocks the linear of this diffusers name (`transformer_blocks.0.attn1.to_q`) belongs to, if any."""
    match = re.fullmatch(r"transformer_blocks\.\d+\.(.+)", module)
    inside = match[1] if match else ""
    return next((part for part, pattern in _PARTS.items() if re.fullmatch(pattern, inside)), None)


def format_of(module: str, precision: Precision) -> type[QuantisedLinear] | None:
    """The class that holds the linear of this diffusers name at `precision`; None where it stays as it is."""
    part = part_of(module)
    return None if part is None else FORMATS[precision].get(part)


def quantise_linears(transformer: nn.Module, precision: Precision) -> None:
    """Replace the linears of a transformer on the meta device by what holds them at `precision`, empty until `place_tensor`."""
    for name, module in list(transformer.named_modules()):
        chosen = format_of(name, precision)
        if chosen is None:
            continue
        assert isinstance(module, nn.Linear), f"{name} is a {type(module).__name__}"
        linear = chosen(module.in_features, module.out_features, bias=module.bias is not None)
        transformer.set_submodule(name, linear.train(module.training))


def place_tensor(
    transformer: nn.Module, name: str, value: torch.Tensor, device: torch.device, precision: Precision, home: torch.device
) -> None:
    """Put the base tensor called `name` in its place on `home`; what is quantised is rounded on `device`, alone."""
    linear = _quantised(transformer, name)
    if linear is not None and name.endswith(".weight"):
        linear.quantise(value.to(device), home)
    else:
        set_module_tensor_to_device(transformer, name, home, value=value, dtype=weight_dtype(name, precision))


def place_code(transformer: nn.Module, name: str, value: torch.Tensor, precision: Precision, home: torch.device) -> None:
    """As `place_tensor`, where a quantised linear's tensors are stored already quantised. Raises UserError for other codes."""
    linear = _quantised(transformer, name)
    leaf = name.rpartition(".")[2]
    if linear is None or leaf not in linear.spec():
        place_tensor(transformer, name, value, home, precision, home)
        return
    expected = linear.spec()[leaf][1]
    if value.dtype != expected:
        message = f"{name} is stored as {value.dtype}, precision {precision} holds it as {expected}"
        raise UserError(f"{message}; write the folder again with `mochi-lora convert base --to {precision}`")
    linear.place({leaf: value}, home)


def _quantised(transformer: nn.Module, name: str) -> QuantisedLinear | None:
    module = transformer.get_submodule(name.rpartition(".")[0])
    return module if isinstance(module, QuantisedLinear) else None


def precisions_of(device: torch.device) -> tuple[Precision, ...]:
    """What `device` can run. A CPU runs fp8 by emulation: right, and slow."""
    missing = set()
    if device.type == "cuda" and not supports_fp8(device):
        missing.add("fp8")
    if device.type == "cuda" and not _has_4_bit_kernels():
        missing.add("nf4")
    return tuple(precision for precision in get_args(Precision) if precision not in missing)


def _has_4_bit_kernels() -> bool:
    from bitsandbytes.cextension import lib  # noqa: PLC0415 - a second to import

    return bool(getattr(lib, "compiled_with_cuda", False))


def require_precision(precision: Precision, device: torch.device) -> None:
    """Raises UserError where `device` cannot run `precision`, naming those it can."""
    runs = precisions_of(device)
    if precision not in runs:
        raise lacking(precision, runs, torch.cuda.get_device_name(device))


def lacking(precision: Precision, runs: Sequence[Precision], card: str) -> UserError:
    """What to say where `card` runs only `runs`."""
    lacks = {
        "fp8": f"{card} has no fp8 matrix products (they need compute capability 8.9 or more: Ada, Hopper, Blackwell)",
        "nf4": f"bitsandbytes has no CUDA kernels on this machine ({card}); `python -m bitsandbytes` says why",
    }
    return UserError(f"engine.precision: {precision}, but {lacks[precision]}; set it to {', '.join(runs[:-1])} or {runs[-1]}")

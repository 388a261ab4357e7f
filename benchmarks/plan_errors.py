"""What each choice of the engine does to velocity and gradient, against the eager bf16 reference: `train_step.py --errors`.

Full width, a few blocks, random weights; gates scaled to a mean |tanh| of 0.1 and 0.5, because the end-to-end error of fp8
depends on them. Every precision against eager bf16; attention, checkpointing, swap and compilation in bf16 against the same.
"""

import json
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import MochiTransformer3DModel

from mochi_lora.config.schema import AdapterConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine import flash4
from mochi_lora.engine.kernels import Attention
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import Precision, part_of, precisions_of
from mochi_lora.engine.quantised import QuantisedLinear
from mochi_lora.engine.swap import home_of
from mochi_lora.model import adapter as lora
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.model.weights import random_transformer
from mochi_lora.spec import Bucket

GATES = (0.1, 0.5)  # mean |tanh|
_BUCKET = Bucket(7, 240, 432)
_CAPTIONS = (120,)
_QUANTISED: tuple[Precision, ...] = ("fp8", "int8", "nf4")
_CUDA_KERNELS: tuple[Attention, ...] = ("cudnn", "flash4", "flash", "efficient")
Found = tuple[torch.Tensor, dict[str, torch.Tensor]]  # velocity, gradient of each adapter tensor


def run(device: torch.device, *, layers: int, heads: int, output: Path, bucket: Bucket = _BUCKET) -> None:
    """Print the table and append its lines."""
    bucket = bucket if device.type == "cuda" else Bucket(7, 32, 48)
    output.parent.mkdir(parents=True, exist_ok=True)
    for gate in GATES:
        factor = factor_for(gate, (layers, heads), device)
        try_plan = partial(outcome, dimensions=(layers, heads), device=device, bucket=bucket, factor=factor)
        reference = try_plan(_reference(device))
        print(f"gates {gate}: relative errors against eager bf16 at {bucket}, {layers} blocks", flush=True)
        for plan in plans(device, layers):
            line: dict[str, Any] = {"benchmark": "plan_errors", "gate": gate, "layers": layers, "plan": asdict(plan)}
            line |= {"gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none (CPU)", "bucket": str(bucket)}
            try:
                line |= errors(try_plan(plan), reference)
                told = f"velocity {line['velocity_error']:.2e}  gradient {line['gradient_error']:.2e}  worst {line['worst']}"
            except (RuntimeError, ValueError) as error:
                line["error"] = told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            with output.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            print(f"  {plan}: {told}", flush=True)


def plans(device: torch.device, layers: int) -> list[Plan]:
    """One change at a time, and at the end what is fastest all together."""
    exact = _reference(device)
    kernels = [name for name in _CUDA_KERNELS if name != "flash4" or flash4.refusal(device) is None]
    changes: list[dict[str, Any]] = [{"precision": name} for name in _QUANTISED if name in precisions_of(device)]
    changes += [{"attention": name} for name in (kernels if device.type == "cuda" else ["math"])]
    changes += [{"checkpointing": mode} for mode in ("mlp_recomputed", "attention_saved", "full", "offload")]
    changes += [{"block_swap": layers}, {"compile": True}, {"compile": True, "checkpointing": "mlp_recomputed"}]
    changes += [{"compile": True, "checkpointing": "attention_saved"}]
    if "fp8" in precisions_of(device):
        changes.append({"precision": "fp8", "compile": True, "checkpointing": "attention_saved"})
    return [exact, *(replace(exact, **change) for change in changes)]


def outcome(plan: Plan, *, dimensions: tuple[int, int], device: torch.device, bucket: Bucket, factor: float) -> Found:
    """Velocity and adapter gradients of one plan; weights, adapter and inputs are the same for every plan."""
    layers, heads = dimensions
    home = partial(home_of, depth=layers, plan=plan) if plan.block_swap else None
    arguments = {"num_layers": layers, "num_attention_heads": heads}
    transformer = random_transformer(arguments, device=device, precision=plan.precision, home=home)
    scale_modulation(transformer, factor)
    parameters = lora.attach(transformer, AdapterConfig(rank=16, alpha=16), seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in parameters.items():
        if ".lora_B." in name:  # zero at the start, which would leave half of the gradients zero
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / 100)
    torch.compiler.reset()
    model = VelocityModel(transformer, plan).train()
    velocity = model(*_inputs(transformer, bucket, device))
    (velocity * torch.randn(velocity.shape, generator=draw).to(device)).mean().backward()
    gradients = {name: parameter.grad.detach().clone() for name, parameter in parameters.items() if parameter.grad is not None}
    return velocity.detach(), gradients


def errors(found: Found, reference: Found) -> dict[str, Any]:
    """Relative Frobenius errors: of the velocity, of all gradients as one vector, and of the worst tensor with its name."""
    (velocity, gradients), (expected, slopes) = found, reference
    assert gradients.keys() == slopes.keys(), "another adapter"
    each = {name: relative(gradients[name], slopes[name]) for name in slopes}
    worst = max(each, key=lambda name: each[name])
    together = [torch.cat([tensors[name].flatten() for name in slopes]) for tensors in (gradients, slopes)]
    return {
        "velocity_error": relative(velocity, expected),
        "gradient_error": relative(*together),
        "worst_gradient_error": each[worst],
        "worst": worst,
    }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def scale_modulation(transformer: MochiTransformer3DModel, factor: float) -> None:
    """Multiply what the modulation linears give: their biases are zero, so it is their weights, or the scales of those."""
    for name, module in transformer.named_modules():
        if part_of(name) == "modulation":
            scale = module.weight_scale if isinstance(module, QuantisedLinear) else module.weight
            scale.data.mul_(factor)


def factor_for(gate: float, dimensions: tuple[int, int], device: torch.device) -> float:
    """The factor that makes the mean |tanh gate| of the random model `gate`; every block's gates come from one vector."""
    layers, heads = dimensions
    arguments = {"num_layers": layers, "num_attention_heads": heads}
    transformer = random_transformer(arguments, device=device, precision="bf16")
    seen: list[torch.Tensor] = []

    def note(_module: object, _inputs: object, output: torch.Tensor) -> None:
        seen.append(torch.cat([output.chunk(4, dim=1)[part].detach().float().flatten() for part in (1, 3)]))

    for block in transformer.transformer_blocks:
        block.norm1.linear.register_forward_hook(note)
    with torch.no_grad():
        VelocityModel(transformer, _reference(device))(*_inputs(transformer, Bucket(7, 32, 48), device))
    gates = torch.cat(seen)
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * gates).tanh().abs().mean()) < gate else (low, middle)
    return low


def _inputs(
    transformer: MochiTransformer3DModel, bucket: Bucket, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, TextBatch]:
    draw = torch.Generator().manual_seed(2)
    latents = torch.randn((len(_CAPTIONS), *bucket.latent_shape), generator=draw).to(device)
    width = transformer.config.text_embed_dim
    text = TextBatch.collate([TextEmbedding(torch.randn(size, width, generator=draw)) for size in _CAPTIONS])
    return latents, torch.full((len(_CAPTIONS),), 0.6, device=device), text.to(device)


def _reference(device: torch.device) -> Plan:
    return Plan(device.type, "bf16", "cudnn" if device.type == "cuda" else "auto", "none")

"""What each choice of the engine does to velocity and gradient, against the eager bf16 reference: `train_step.py --errors`.

Two models. Mochi at full width, a few blocks, random weights, on random latents; its gates scaled to a mean |tanh| of 0.1 and
0.5, because the end-to-end error of fp8 depends on them. And mochi-tiny, trained, with the gates it learned, on two drawn clips
with their captions. Every precision against eager bf16; attention, checkpointing, swap and compilation in bf16 against that;
at the end what is fastest all together.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import MochiTransformer3DModel

from mochi_lora.config.engine import Mode
from mochi_lora.config.schema import AdapterConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine import flash4
from mochi_lora.engine.kernels import Attention
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import Precision, part_of, precisions_of
from mochi_lora.engine.quantised import QuantisedLinear
from mochi_lora.engine.swap import home_of
from mochi_lora.model import adapter as lora
from mochi_lora.model.flow import interpolate
from mochi_lora.model.text import TextEncoder
from mochi_lora.model.transformer import TextBatch, VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import load_transformer, random_transformer
from mochi_lora.spec import Bucket
from mochi_lora.tiny.exam import exam_scenes, exam_sentences
from mochi_lora.tiny.pretrained import WEIGHTS
from mochi_lora.tiny.render import render_batch, scene_batch
from mochi_lora.tiny.vae_stage import to_pixels
from mochi_lora.tiny.world import FRAMES, HEIGHT, WIDTH

Model = Literal["full width", "mochi-tiny"]
MODELS: dict[str, tuple[Model, ...]] = {"full": ("full width",), "tiny": ("mochi-tiny",), "both": ("full width", "mochi-tiny")}
GATES = (0.1, 0.5)  # mean |tanh|
_BUCKET = Bucket(7, 240, 432)
_SIGMA = 0.6
_TEXT_WIDTH = 4096  # T5 XXL's
_QUANTISED: tuple[Precision, ...] = ("fp8", "int8", "nf4")
_CUDA_KERNELS: tuple[Attention, ...] = ("cudnn", "flash4", "flash", "efficient", "math")
_CPU_KERNELS: tuple[Attention, ...] = ("flash", "math")
_CPU = torch.device("cpu")
Found = tuple[torch.Tensor, dict[str, torch.Tensor]]  # velocity, gradient of each adapter tensor
Inputs = tuple[torch.Tensor, torch.Tensor, TextBatch]


@dataclass(frozen=True)
class Subject:
    """A model that plans are tried on; weights, adapter and inputs are the same for every plan."""

    name: Model
    gate: float  # mean |tanh|
    depth: int
    bucket: Bucket
    make: Callable[[Plan], MochiTransformer3DModel]
    inputs: Inputs
    exact: bool  # whether it has the same weights in float32


def run(device: torch.device, models: str, *, layers: int, heads: int, output: Path) -> None:
    """Print the table and append its lines, of what `MODELS` says."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for subject in subjects(device, MODELS[models], layers, heads):
        reference = outcome(subject, _reference(device))
        told = f"{subject.name}, gates {subject.gate}, {subject.depth} blocks: relative errors against eager bf16"
        print(f"{told} at {subject.bucket}", flush=True)
        for plan in plans(device, subject):
            line: dict[str, Any] = {"benchmark": "plan_errors", "model": subject.name, "gate": subject.gate}
            line |= {"layers": subject.depth, "plan": asdict(plan), "bucket": str(subject.bucket)}
            line |= {"gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none (CPU)"}
            try:
                line |= errors(outcome(subject, plan), reference)
                told = f"velocity {line['velocity_error']:.2e}  gradient {line['gradient_error']:.2e}  worst {line['worst']}"
            except (RuntimeError, ValueError, AssertionError) as error:  # flash4 asserts the head sizes that it was made for
                line["error"] = told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            with output.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            print(f"  {plan}: {told}", flush=True)


def plans(device: torch.device, subject: Subject) -> list[Plan]:
    """One change at a time, and at the end what is fastest all together."""
    exact, runs = _reference(device), precisions_of(device)
    kernels = [name for name in _CUDA_KERNELS if name != "flash4" or flash4.refusal(device) is None]
    changes: list[dict[str, Any]] = [{"precision": name} for name in _QUANTISED if name in runs]
    if subject.exact:
        changes.append({"precision": "fp32", "attention": "auto"})  # cuDNN and flash have no kernel for it
    changes += [{"attention": name} for name in (kernels if device.type == "cuda" else _CPU_KERNELS)]
    changes += [{"checkpointing": mode} for mode in get_args(Mode)]
    changes += [{"block_swap": subject.depth}]
    changes += [{"compile": True, "checkpointing": mode} for mode in get_args(Mode)]
    fastest: dict[str, Any] = {"compile": True, "attention": "flash4" if "flash4" in kernels else exact.attention}
    changes += [fastest | {"precision": name} for name in ("bf16", "fp8") if name in runs]
    if "fp8" in runs:
        changes.append({"precision": "fp8", "compile": True, "checkpointing": "attention_saved"})
    return list(dict.fromkeys([exact, *(replace(exact, **change) for change in changes)]))


def subjects(device: torch.device, models: Sequence[Model], layers: int, heads: int) -> Iterator[Subject]:
    """Mochi with each of the gates, then mochi-tiny."""
    for gate in GATES if "full width" in models else ():
        yield full_width(gate, (layers, heads), device)
    if "mochi-tiny" in models:
        yield trained_tiny(device)


def full_width(gate: float, dimensions: tuple[int, int], device: torch.device) -> Subject:
    """Random weights; on a CPU a small clip, to try it out."""
    layers, heads = dimensions
    arguments = {"num_layers": layers, "num_attention_heads": heads}
    factor = factor_for(gate, dimensions, device)
    bucket = _BUCKET if device.type == "cuda" else Bucket(7, 32, 48)

    def make(plan: Plan) -> MochiTransformer3DModel:
        home = partial(home_of, depth=layers, plan=plan) if plan.block_swap else None
        transformer = random_transformer(arguments, device=device, precision=plan.precision, home=home)
        scale_modulation(transformer, factor)
        return transformer

    return Subject("full width", gate, layers, bucket, make, _random_inputs(bucket, device), exact=False)


def trained_tiny(device: torch.device) -> Subject:
    """mochi-tiny as it is shipped, on held-out clips of its own world."""

    def make(plan: Plan) -> MochiTransformer3DModel:
        home = partial(home_of, depth=depth, plan=plan) if plan.block_swap else None
        return load_transformer(WEIGHTS / "transformer", device=device, precision=plan.precision, home=home).transformer

    transformer = load_transformer(WEIGHTS / "transformer", device=device, precision="bf16").transformer
    depth, inputs = len(transformer.transformer_blocks), _drawn_inputs(device)
    gate = float(gates_of(transformer, inputs, device).tanh().abs().mean())
    return Subject("mochi-tiny", round(gate, 2), depth, Bucket(FRAMES, HEIGHT, WIDTH), make, inputs, exact=True)


def outcome(subject: Subject, plan: Plan) -> Found:
    """Velocity and adapter gradients of one plan."""
    transformer = subject.make(plan)
    parameters = lora.attach(transformer, AdapterConfig(rank=16, alpha=16), seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in parameters.items():
        if ".lora_B." in name:  # zero at the start, which would leave half of the gradients zero
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / 100)
    torch.compiler.reset()
    model = VelocityModel(transformer, plan).train()
    velocity = model(*subject.inputs)
    (velocity * torch.randn(velocity.shape, generator=draw).to(velocity.device)).mean().backward()
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
    gates = gates_of(transformer, _random_inputs(Bucket(7, 32, 48), device), device)
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * gates).tanh().abs().mean()) < gate else (low, middle)
    return low


def gates_of(transformer: MochiTransformer3DModel, inputs: Inputs, device: torch.device) -> torch.Tensor:
    """What the blocks' gates of the visual stream are before their tanh, all in one vector."""
    seen: list[torch.Tensor] = []

    def note(_module: object, _inputs: object, output: torch.Tensor) -> None:
        seen.append(torch.cat([output.chunk(4, dim=1)[part].detach().float().flatten() for part in (1, 3)]))

    for block in transformer.transformer_blocks:
        block.norm1.linear.register_forward_hook(note)
    with torch.no_grad():
        VelocityModel(transformer, _reference(device))(*inputs)
    return torch.cat(seen)


def _random_inputs(bucket: Bucket, device: torch.device) -> Inputs:
    """One sample, with a caption of 120 tokens."""
    draw = torch.Generator().manual_seed(2)
    latents = torch.randn((1, *bucket.latent_shape), generator=draw).to(device)
    text = TextBatch.collate([TextEmbedding(torch.randn(120, _TEXT_WIDTH, generator=draw))])
    return latents, torch.full((1,), _SIGMA, device=device), text.to(device)


def _drawn_inputs(device: torch.device) -> Inputs:
    """Two scenes that mochi-tiny never saw, with sentences of two lengths, by its own VAE and text encoder; made on the CPU, so
    that every device gets the same.
    """
    scenes = exam_scenes(2)
    text = TextBatch.collate(TextEncoder.load(WEIGHTS, device=_CPU, precision="fp32").embed(exam_sentences(scenes)))
    vae = MochiVae.load(WEIGHTS / "vae", device=_CPU, precision="fp32")
    clean = torch.stack([vae.stats.normalise(vae.encode(clip).mean) for clip in to_pixels(render_batch(scene_batch(scenes)))])
    noise, sigma = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)), torch.full((len(scenes),), _SIGMA)
    return interpolate(clean, noise, sigma).to(device), sigma.to(device), text.to(device)


def _reference(device: torch.device) -> Plan:
    return Plan(device.type, "bf16", "cudnn" if device.type == "cuda" else "auto", "none")

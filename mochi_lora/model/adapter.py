"""The LoRA: which linears it hits, how it is attached, and how it gets on and off a transformer.

Files are `model.adapter_file`'s; here an adapter is tensors plus PEFT's own `LoraConfig`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from mochi_lora.config.schema import AdapterConfig
from mochi_lora.errors import UserError
from mochi_lora.model.quantised_adapter import register
from mochi_lora.streams import Purpose, stream

_VISUAL = r"attn1\.(to_q|to_k|to_v|to_out\.0)"
_TEXT = r"attn1\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MLP = r"(ff|ff_context)\.net\.(0\.proj|2)"
PRESETS = {
    "visual_attention": _VISUAL,
    "joint_attention": f"{_VISUAL}|{_TEXT}",
    "joint_attention_mlp": f"{_VISUAL}|{_TEXT}|{_MLP}",
}
TRAINED = "default"


@dataclass(frozen=True)
class Adapter:
    """LoRA factors and the configuration they need to mean anything (alpha above all)."""

    tensors: dict[str, torch.Tensor]  # `transformer_blocks.0.attn1.to_q.lora_A.weight` -> float32 on the CPU
    config: dict[str, Any]  # PEFT's LoraConfig as a dictionary
    source: str  # where it came from, for messages


def target_pattern(targets: str, blocks: int) -> str:
    """Full-match regular expression of adapted module names.

    Anchored to the blocks: a suffix list like `to_q` also hits `time_embed.pooler.to_q`. The last block's `add_q_proj` is
    left out because its output is discarded, so it never gets a gradient.
    """
    inside = PRESETS.get(targets, targets)
    try:
        re.compile(inside)
    except re.error as error:
        message = f"adapter.targets: {targets!r} is no regular expression ({error}); presets are {', '.join(PRESETS)}"
        raise UserError(message) from error
    return rf"transformer_blocks\.(?!{blocks - 1}\.attn1\.add_q_proj$)\d+\.({inside})"


def lora_config(settings: AdapterConfig, blocks: int) -> LoraConfig:
    """PEFT's configuration of the adapter to be trained."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_pattern(settings.targets, blocks),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )


def attach(transformer: MochiTransformer3DModel, settings: AdapterConfig, seed: int) -> dict[str, nn.Parameter]:
    """Add a fresh adapter; returns its trainable float32 parameters by name, in a fixed order.

    A is uniform in +-1/sqrt(fan_in) (PEFT's Kaiming default) drawn from our own stream, so that every rank and every
    device starts from the same values; B is zero. Raises UserError if the targets match nothing.
    """
    config = lora_config(settings, len(transformer.transformer_blocks))
    config.target_modules = _targets(transformer, settings.targets, str(config.target_modules))
    _add(transformer, config, TRAINED)
    parameters = trainable(transformer)
    generator = stream(seed, Purpose.ADAPTER)
    for name, parameter in parameters.items():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            values = generator.uniform(-bound, bound, parameter.shape).astype("float32")
            parameter.data.copy_(torch.from_numpy(values))
    return parameters


def trainable(transformer: MochiTransformer3DModel) -> dict[str, nn.Parameter]:
    """The adapter's parameters, sorted by name, made float32: in bf16 an Adam step at 1e-5 changes almost nothing."""
    found = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return dict(sorted(found.items()))


def _add(transformer: MochiTransformer3DModel, config: LoraConfig, name: str) -> None:
    """PEFT's `add_adapter` without its two surprises: it draws from torch's global generator (values that are overwritten
    anyway), and its new layers are in training mode, so that a frozen model in evaluation mode would sample with dropout.
    """
    with torch.random.fork_rng(devices=[]):
        transformer.add_adapter(register(config), name)
    transformer.train(transformer.training)


def _linears(transformer: MochiTransformer3DModel) -> list[str]:
    """The base's linears under their own names: PEFT moves an adapted one to `<name>.base_layer`."""
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return [name.removesuffix(".base_layer") for name in linears if ".lora_" not in name]


def _targets(transformer: MochiTransformer3DModel, targets: str, pattern: str) -> str | list[str]:
    """`pattern` where it names linears alone; PEFT cannot adapt the norms that `attn1.*` also names, so else the linears."""
    linears = _linears(transformer)
    if chosen := [name for name in linears if re.fullmatch(pattern, name)]:
        named = [name for name, _ in transformer.named_modules() if re.fullmatch(pattern, name)]
        return pattern if len(named) == len(chosen) else chosen
    inside = sorted({name.split(".", 2)[2] for name in linears if name.startswith("transformer_blocks.0.")})
    message = f"adapter.targets: {targets!r} matches no linear inside the blocks; they are {', '.join(inside)}"
    raise UserError(message)


def current(transformer: MochiTransformer3DModel) -> Adapter:
    """The trained adapter as it stands, copied to the CPU."""
    state = get_peft_model_state_dict(transformer, adapter_name=TRAINED)
    tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in sorted(state.items())}
    return Adapter(tensors, plain_config(transformer.peft_config[TRAINED]), "the adapter in training")


def plain_config(config: LoraConfig) -> dict[str, Any]:
    """PEFT's configuration as JSON-ready values."""
    content = {key: value for key, value in config.to_dict().items() if value is not None}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def put(transformer: MochiTransformer3DModel, adapter: Adapter, name: str) -> None:
    """Add `adapter` under `name`. Raises UserError unless every tensor finds its place and every place its tensor."""
    known = LoraConfig.__dataclass_fields__
    prefixes = {re.sub(r"\.lora_\w+.*$", "", key) for key in adapter.tensors}
    linears = set(_linears(transformer))
    if strangers := sorted(prefixes - linears):
        message = f"{adapter.source}: {len(strangers)} of {len(prefixes)} modules are not in this model ({strangers[0]}, ...)"
        raise UserError(f"{message}; it was made for another architecture")
    try:
        _add(transformer, LoraConfig(**{key: value for key, value in adapter.config.items() if key in known}), name)
    except (TypeError, ValueError) as error:
        message = f"{adapter.source}: its LoRA configuration is not one PEFT can use ({error}); get or write the file again"
        raise UserError(message) from error
    load_into(transformer, adapter, name)


def require_same_scale(settings: AdapterConfig, adapter: Adapter) -> None:
    """Raises UserError unless a starting adapter means what is configured: rank, alpha, rslora and dora."""
    names = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}
    for key, setting in names.items():
        stored, now = adapter.config.get(key, False), getattr(settings, setting)
        if stored != now:
            message = f"adapter.init_adapter: {adapter.source} has {setting} {stored}, this configuration {now}"
            raise UserError(f"{message}; set adapter.{setting}: {stored}")


def load_into(transformer: MochiTransformer3DModel, adapter: Adapter, name: str) -> None:
    """Copy the tensors of `adapter` into the one called `name` that is already there; shapes and names must fit exactly."""
    tensors = adapter.tensors
    expected = get_peft_model_state_dict(transformer, adapter_name=name)
    if missing := sorted(set(expected) ^ set(tensors)):
        message = f"{adapter.source}: {len(missing)} tensors differ from what rank and targets ask for ({missing[0]}, ...)"
        raise UserError(message)
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            message = f"{adapter.source}: {key} has shape {tuple(tensor.shape)}, expected {tuple(expected[key].shape)}"
            raise UserError(f"{message}; its header states another rank, or it was made for another architecture")
    set_peft_model_state_dict(transformer, tensors, adapter_name=name)
    for module_name, parameter in transformer.named_parameters():
        if ".lora_" in module_name:
            parameter.data = parameter.data.float()


def places_of(transformer: MochiTransformer3DModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapter called `name`, by their names in a file; they stay the same ones when the model moves.

    To be kept by who fills them often: finding them is a walk over the whole model, as is all that PEFT does by name.
    """
    found = {}
    for key, parameter in transformer.named_parameters():
        if match := re.fullmatch(rf"(.*\.lora_\w+)\.{re.escape(name)}(\.weight)", key):
            found[match[1] if match[1].endswith(".lora_magnitude_vector") else match[1] + match[2]] = parameter
    return found


@torch.no_grad()
def refill(places: dict[str, nn.Parameter], adapter: Adapter, strength: float) -> None:
    """Copy an adapter of the same names and shapes into `places_of` one, with B times `strength`: a compiled block asks for the
    scales that PEFT keeps, not for a parameter's values. DoRA's norm takes B times its scale as well, so it is the same there.
    """
    assert places.keys() == adapter.tensors.keys(), f"{adapter.source}: {sorted(places.keys() ^ adapter.tensors.keys())[:3]}"
    for key, parameter in places.items():
        tensor = adapter.tensors[key]
        assert parameter.shape == tensor.shape, f"{adapter.source}: {key}"
        parameter.copy_(tensor)
        if ".lora_B." in key:
            parameter.mul_(strength)


@contextmanager
def strengths(transformer: MochiTransformer3DModel, names: Sequence[str], weights: Sequence[float]) -> Iterator[None]:
    """Run with each named adapter at its strength; afterwards all of them are on, at strength 1.

    Strength 0 leaves an adapter out: DoRA's magnitudes act even where the factors are scaled to zero.
    """
    active = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight != 0]
    if active:
        transformer.set_adapters([name for name, _ in active], [weight for _, weight in active])
        transformer.enable_adapters()
    elif getattr(transformer, "peft_config", None):
        transformer.disable_adapters()
    try:
        yield
    finally:
        if names:
            transformer.set_adapters(list(names), [1.0] * len(names))
        if getattr(transformer, "peft_config", None):
            transformer.enable_adapters()

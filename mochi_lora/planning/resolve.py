"""Settings to a plan on this machine: what is left on `auto` is settled before any weight is read."""

from dataclasses import dataclass

import torch

from mochi_lora.config.engine import EngineConfig, parallel_sizes
from mochi_lora.engine.kernel_choice import resolve_attention
from mochi_lora.engine.kernels import Attention
from mochi_lora.engine.plan import Plan, resolve_device
from mochi_lora.engine.precision import Precision, compute_dtype, require_precision
from mochi_lora.planning.cards import card_of
from mochi_lora.planning.choice import Choice, Room, check_settings, choose, named_precision, room_here
from mochi_lora.planning.workload import Workload


@dataclass(frozen=True)
class Resolved:
    """The plan, and on a GPU the predictions that led to it."""

    plan: Plan
    choice: Choice | None

    def when_full(self) -> str | None:
        """What to say when memory was too small all the same; None where nothing was predicted."""
        return None if self.choice is None else self.choice.when_full()


def resolve_plan(engine: EngineConfig, work: Workload, room: Room | None = None) -> Resolved:
    """Settle every `auto`; the attention kernel is tried, forward and backward, on the run's own shape. `room` is what is free
    on a GPU; None: what is free here.

    Raises UserError where a setting does not suit the model or the device, and where no plan fits.
    """
    device = torch.device(resolve_device(engine.device))
    check_settings(engine, work)
    if engine.precision != "auto":
        require_precision(engine.precision, device)
    precision = named_precision(engine, work) or ("fp32" if device.type == "cpu" else "bf16")
    model = work.model
    shape = (work.batch, work.bucket.tokens + work.text_tokens, model.heads, model.head_size)
    attention = resolve_attention(engine.attention, device, compute_dtype(precision), shape)
    if device.type == "cpu":
        return Resolved(_on_cpu(engine, precision, attention), None)
    choice = choose(engine, work, card_of(device), room or room_here(device), attention)
    return Resolved(choice.pick.plan, choice)


def _on_cpu(engine: EngineConfig, precision: Precision, attention: Attention) -> Plan:
    """Nothing is short and nothing is gained: exact, all kept, not compiled, unless asked for."""
    sizes = parallel_sizes(engine.parallel)
    return Plan(
        device="cpu",
        precision=precision,
        attention=attention,
        checkpointing="none" if engine.checkpointing == "auto" else engine.checkpointing,
        block_swap=0 if engine.block_swap == "auto" else engine.block_swap,
        compile=False if engine.compile == "auto" else engine.compile,
        context=sizes.get("context", 1),
        shard=sizes.get("shard", 1),
        cpu_offload=False if engine.cpu_offload == "auto" else engine.cpu_offload,
        guidance_passes="two" if engine.guidance_passes == "auto" else engine.guidance_passes,
    )

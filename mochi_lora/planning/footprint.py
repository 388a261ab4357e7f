"""How much memory a plan takes, predicted before any weight is read: on the device, pinned and in all on the host.

From first principles with a few fitted constants (`fitted.yaml`). A unit is one vector of the visual width, bf16 unless the
precision is fp32; the text stream is half as wide, so a text token counts half. The device's peak is the worst of the run's
moments: a training step at the largest clip, denoising a video, decoding it.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby

import yaml

from mochi_lora.config.engine import Mode
from mochi_lora.engine.checkpoints import modes_of
from mochi_lora.engine.fp8 import Fp8Linear
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import FORMATS, Part, Precision, compute_dtype
from mochi_lora.engine.quantised import Int8Linear, Nf4Linear, QuantisedLinear
from mochi_lora.planning.workload import ModelSize, Workload

GIB = 2**30
_SLOTS = 2  # swapped blocks that are on the device at a time
_IN_FLIGHT = 2  # blocks whose offloaded activations are on the device at a time
_SCORE_COPIES = 3  # that stand at a time in either half of the kernel called math, counted in the code
_PROCESS_GIB = 4.0  # Python, torch, CUDA's libraries, the loader's processes
# Bytes per parameter; nf4: half a byte, and a doubly quantised scale per 64. Scales per channel are too few to count.
_BYTES: dict[type[QuantisedLinear] | None, float] = {Fp8Linear: 1, Int8Linear: 1, Nf4Linear: 0.5 + (1 + 4 / 256) / 64}
# Units that a block keeps through the forward pass, besides the attention's float32 log-sum-exp: its inputs; these and the
# attention's output; these, q, k and v, the output projection and the MLP's output. None: whatever autograd keeps.
_KEPT: dict[Mode, float | None] = {"full": 1, "attention_saved": 2, "offload": 2, "mlp_recomputed": 7, "none": None}


@dataclass(frozen=True)
class Constants:
    """`fitted.yaml`, which says what each is."""

    base_gib: float
    kept_compiled: float
    kept_eager: float
    gradients_compiled: float
    gradients_eager: float
    forward_compiled: float
    forward_eager: float
    moved_compiled: float
    again_compiled: float
    moved_eager: float
    again_eager: float
    quantising: float
    fixed_seconds: float


@cache
def fitted() -> Constants:
    """The committed constants."""
    return Constants(**yaml.safe_load(files("mochi_lora.planning").joinpath("fitted.yaml").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Footprint:
    """Predicted GiB."""

    moments: tuple[tuple[str, float], ...]  # (what the run is doing then, allocated on the device)
    pinned: float
    host: float  # with what is pinned

    @property
    def device(self) -> float:
        """At the worst moment."""
        return max(gib for _, gib in self.moments)

    @property
    def worst(self) -> str:
        """What the run is doing then."""
        return max(self.moments, key=lambda moment: moment[1])[0]


def predict_memory(plan: Plan, work: Workload, constants: Constants | None = None) -> Footprint:
    """What `plan` takes over the whole run."""
    known = constants or fitted()
    swapped = plan.block_swap * _block_bytes(work.model, plan.precision) / GIB
    resident = resident_bytes(work.model, plan) / GIB
    trained = work.adapter.bytes / GIB if work.adapter else 0.0
    beside = work.beside_gib * (not plan.cpu_offload)
    standing = known.base_gib + resident + trained + beside
    offloaded = _offloaded(plan, work) / GIB
    scores = _scores(plan, work, work.bucket.tokens, work.batch)
    moments = [("training", standing + (_activations(plan, work, known) + scores) / GIB)] if work.adapter else []
    forward = (known.forward_compiled if plan.compile else known.forward_eager) * _unit(plan, work.model)
    moments.append(("validation", standing + (forward * _tokens(work) + scores) / GIB))
    host = _PROCESS_GIB + max(swapped + offloaded, _loaded_to_be_split(plan, work.model) / GIB)
    if work.films:
        together = 2 if work.films.guided and plan.guidance_passes == "one" else 1
        tokens = work.films.bucket.tokens
        sample = together * (tokens / work.context + work.text_tokens / 2)
        denoising = standing + (forward * sample + _scores(plan, work, tokens, 1)) / GIB
        waiting = work.films.vae_gib * (work.adapter is None and not plan.cpu_offload)
        moments.append(("denoising videos", denoising + waiting))
        moments.append(("decoding videos", standing - resident * plan.cpu_offload + work.films.decoding_gib))
        host += (resident + work.beside_gib) * plan.cpu_offload
    return Footprint(tuple(moments), swapped + offloaded, host)


def resident_bytes(model: ModelSize, plan: Plan) -> float:
    """Of the frozen base what is on the device at all times, with the places of blocks that come and go."""
    block, comes = _block_bytes(model, plan.precision), plan.block_swap > 0 or plan.shard > 1
    elsewhere = plan.block_swap * block
    if plan.shard > 1:
        elsewhere = sum(split_bytes(model, plan.precision)) * (1 - 1 / plan.shard)
    return weight_bytes(model, plan.precision) - elsewhere + _SLOTS * comes * block


@cache
def weight_bytes(model: ModelSize, precision: Precision) -> float:
    """The frozen base at `precision`, all of it."""
    blocks = model.layers * _block_bytes(model, precision) - _missing_in_the_last(model, precision)
    return blocks + compute_dtype(precision).itemsize * model.outside + 4 * model.float32


@cache
def split_bytes(model: ModelSize, precision: Precision) -> tuple[float, ...]:
    """What shard ranks split of each block."""
    whole = _block_bytes(model, precision)
    blocks = [whole] * model.layers
    blocks[-1] -= _missing_in_the_last(model, precision)
    return tuple(blocks)


def kept_bytes(mode: Mode, plan: Plan, work: Workload, constants: Constants | None = None) -> float:
    """What one block of this mode keeps from the forward to the backward pass; the plan's own modes do not matter."""
    known = constants or fitted()
    units = _KEPT[mode]
    if units is None:
        return (known.kept_compiled if plan.compile else known.kept_eager) * _unit(plan, work.model) * _tokens(work)
    statistics = 4 * work.model.heads if mode != "full" else 0
    return (units * _unit(plan, work.model) + statistics) * _tokens(work)


@cache
def runs_of(checkpointing: str, layers: int) -> tuple[tuple[Mode, int], ...]:
    """(mode, number of blocks) from the first block to the last."""
    return tuple((mode, len(list(run))) for mode, run in groupby(modes_of(checkpointing, layers)))


def offloading_blocks(plan: Plan, work: Workload) -> int:
    """Blocks whose activations go to the host."""
    return sum(blocks for mode, blocks in runs_of(plan.checkpointing, work.model.layers) if mode == "offload")


def _activations(plan: Plan, work: Workload, known: Constants) -> float:
    """Peak of a step's activations: blocks go backwards, so a block's own work stands on what the blocks before it keep."""
    gradients = (known.gradients_compiled if plan.compile else known.gradients_eager) * _unit(plan, work.model) * _tokens(work)
    everything = kept_bytes("none", plan, work, known)
    below, peak = 0.0, 0.0
    for mode, blocks in runs_of(plan.checkpointing, work.model.layers):
        own = kept_bytes(mode, plan, work, known)
        on_device = min(blocks, _IN_FLIGHT) * own if mode == "offload" else blocks * own
        below += on_device
        peak = max(peak, below + gradients + (0 if mode == "none" else everything))
    return peak


def _loaded_to_be_split(plan: Plan, model: ModelSize) -> float:
    """What a shard rank has on the host before it keeps its part. In bf16 that is a mapped file, which takes nothing."""
    return sum(split_bytes(model, plan.precision)) if plan.shard > 1 and FORMATS[plan.precision] else 0.0


def _offloaded(plan: Plan, work: Workload) -> float:
    if work.adapter is None:
        return 0.0
    return offloading_blocks(plan, work) * kept_bytes("offload", plan, work)


def _scores(plan: Plan, work: Workload, tokens: int, batch: int) -> float:
    """Of the kernel called math at its worst moment (`engine.kernels`), one block's; every other kernel has none."""
    if plan.attention != "math":
        return 0.0
    return _SCORE_COPIES * score_bytes(work, tokens, batch)


def score_bytes(work: Workload, tokens: int, batch: int) -> float:
    """One copy of the float32 scores of every token with every token."""
    return 4.0 * batch * work.model.heads / work.context * (tokens + work.text_tokens) ** 2


@cache
def _block_bytes(model: ModelSize, precision: Precision) -> float:
    visual, text, modulation = (_stored(precision, part) for part in ("visual", "text", "modulation"))
    return visual * model.visual + text * model.text + modulation * model.modulation


def _missing_in_the_last(model: ModelSize, precision: Precision) -> float:
    text, modulation = (_stored(precision, part) for part in ("text", "modulation"))
    return text * (model.text - model.last_text) + modulation * (model.modulation - model.last_modulation)


def _stored(precision: Precision, part: Part) -> float:
    """Bytes per parameter of one part of the blocks."""
    return _BYTES.get(FORMATS[precision].get(part), compute_dtype(precision).itemsize)


def _unit(plan: Plan, model: ModelSize) -> int:
    return compute_dtype(plan.precision).itemsize * model.width


def _tokens(work: Workload) -> float:
    return work.tokens + work.batch * work.text_tokens / 2

"""The models as the commands sample with them: T5, and transformer and VAE behind one sampler."""

from functools import partial
from pathlib import Path

import torch

from mochi_lora.config.schema import Config
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.swap import home_of
from mochi_lora.inference.live import LiveSampler
from mochi_lora.model.base import locate
from mochi_lora.model.text import TextEncoder
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import LoadedTransformer, load_transformer, read_config
from mochi_lora.parallel.mesh import ALONE, Ranks, layout_of
from mochi_lora.planning.choice import Room
from mochi_lora.planning.resolve import Resolved, resolve_plan
from mochi_lora.planning.workload import ModelSize
from mochi_lora.runs.decoder import load_decoder
from mochi_lora.runs.processes import processes_here
from mochi_lora.runs.workloads import sampling_work


def sampling_plan(config: Config, *, with_text: bool = False, ranks: Ranks = ALONE, room: Room | None = None) -> Resolved:
    """The engine's settings on this machine; reads no weight. `with_text`: T5 stays where it works; `room` as there."""
    layout_of(config.engine.parallel, ranks.layout.world)  # refused here by who cannot join a launch
    work = sampling_work(config, with_text=with_text, processes=processes_here())
    return resolve_plan(config.engine, work, room)


def load_planned(folder: Path, plan: Plan, device: torch.device) -> LoadedTransformer:
    """The frozen transformer as `plan` holds it: what is swapped or sharded never stands on the GPU whole."""
    layers = ModelSize.of(read_config(folder)).layers
    home = partial(home_of, depth=layers, plan=plan) if plan.block_swap or plan.shard > 1 else None
    return load_transformer(folder, device=device, precision=plan.precision, home=home)


def load_text(config: Config, *, device: torch.device) -> TextEncoder:
    """T5 on `device`."""
    base = locate(config.model.base, config.model.revision, "text_encoder").parent
    locate(config.model.base, config.model.revision, "tokenizer")
    return TextEncoder.load(base, device=device, precision=config.encode.text_precision)


def load_sampler(config: Config, plan: Plan, *, assume_alpha_is_rank: bool, ranks: Ranks = ALONE) -> LiveSampler:
    """Transformer and VAE; under offloading the VAE rests on the CPU until it is needed."""
    device, offload = torch.device(plan.device), plan.cpu_offload
    folder = locate(config.model.base, config.model.revision, "transformer")
    transformer = load_planned(folder, plan, device).transformer
    vae = load_decoder(config, device, rests_on=torch.device("cpu") if offload else None)
    model = VelocityModel(transformer, plan, ranks)
    return LiveSampler(model, vae, device=device, offload=offload, assume_alpha_is_rank=assume_alpha_is_rank)

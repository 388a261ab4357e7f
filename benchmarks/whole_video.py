"""One video as `mochi-lora sample` makes it, text to mp4, full size and random weights; `sample_step.py --whole` runs it.

The parts come and go as in `mochi_lora.runs.videos`: T5 first and alone, then transformer and VAE, the adapter from a file.
Weights are drawn on the device, so nothing is said about reading them.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from train_step import GIB, about, attach, cap_memory, in_a_line, say
from train_step import cases as training_cases
from transformers import T5Config, T5EncoderModel

from mochi_lora.config.engine import EngineConfig
from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import Config, SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.swap import home_of
from mochi_lora.inference.live import LiveSampler
from mochi_lora.inference.prompts import embed_prompts
from mochi_lora.inference.video import write_mp4
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import save_adapter
from mochi_lora.model.text import TextEncoder
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import random_transformer
from mochi_lora.planning.resolve import resolve_plan
from mochi_lora.planning.workload import ModelSize, Workload
from mochi_lora.runs.workloads import film_work
from mochi_lora.spec import Bucket
from mochi_lora.training.trial import TEXT_TOKENS

PARTS = ("text", "denoising", "decoding", "writing")
T5_WIDTH = 4096
_PROMPT = "a prompt"  # what it says does not matter: the words' numbers are made up


def lines(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A line for each clip, adapter and plan asked for; without a plan the engine chooses for what is free."""
    cap_memory(arguments.memory_cap_gib, device)
    buckets = [Bucket(frames, arguments.height, arguments.width) for frames in arguments.frames]
    given = arguments.plan or arguments.plans
    asked = [(case.bucket, case.plan) for case in training_cases(arguments, device)] if given else [(b, None) for b in buckets]
    for (bucket, plan), adapter in product(asked, arguments.adapter):
        if device.type == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        yield whole(arguments, bucket, plan, adapter)


def whole(arguments: argparse.Namespace, bucket: Bucket, plan: Plan | None, adapter: str) -> dict[str, Any]:
    """One video of a few denoising steps: seconds of each part, and the worst memory of all."""
    dimensions = {
        "num_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "text_embed_dim": arguments.text_width,
    }
    shape = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    sample = SampleConfig(**shape, steps=max(2, arguments.steps))
    chosen = plan is None
    work = Workload(ModelSize.of(dimensions), bucket, 1, 1, None, film_work(Config(sample=sample)))
    plan = plan or resolve_plan(EngineConfig(), work).plan
    say(f"whole {bucket}, adapter {adapter}: {plan}{'' if chosen else ' (given)'}")
    told = about("sample_step", bucket, plan, arguments)
    told |= {"sampler": "mochi-lora, text to mp4", "adapter": adapter, "memory_cap_gib": arguments.memory_cap_gib}
    told |= {"plan_chosen": chosen, "steps": sample.steps}
    try:
        with tempfile.TemporaryDirectory() as folder:
            return told | _filmed(arguments, sample, plan, dimensions, adapter, Path(folder))
    except RuntimeError as error:  # out of memory is one
        return told | {"error": in_a_line(error)}


def _filmed(
    arguments: argparse.Namespace, sample: SampleConfig, plan: Plan, dimensions: dict[str, int], adapter: str, folder: Path
) -> dict[str, Any]:
    device = torch.device(plan.device)
    seconds = {}
    prompt, null, seconds["text"] = _embedded(arguments.text_width, device)
    choices = [AdapterChoice(_adapter_file(dimensions, arguments.rank, folder), 1.0)] if adapter == "attached" else []
    sampler = _sampler(arguments, plan, dimensions)
    marks, steps = [time.perf_counter()], []
    latents = sampler.latents(prompt, null, sample, 0, choices, on_step=lambda *_: steps.append(_waited(device)))
    marks.append(_waited(device))
    frames = sampler.frames(latents)
    marks.append(time.perf_counter())
    write_mp4(folder / "video.mp4", frames)
    marks.append(time.perf_counter())
    seconds |= {part: until - since for part, (since, until) in zip(PARTS[1:], pairwise(marks), strict=True)}
    cuda = device.type == "cuda"
    return {
        "step_seconds": {"first": steps[0] - marks[0], "last": steps[-1] - steps[-2]},
        "part_seconds": seconds,
        "peak_gib": torch.cuda.max_memory_reserved(device) / GIB if cuda else None,
        "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB if cuda else None,
        "finite": bool(torch.isfinite(latents).all()),
    }


def _embedded(width: int, device: torch.device) -> tuple[TextEmbedding, TextEmbedding, float]:
    """A prompt and the null prompt through T5, which is gone afterwards, and the seconds of that."""
    encoder = TextEncoder(random_t5(width, device), MadeUpWords(), width)
    start = _waited(device)
    found = embed_prompts(encoder, [_PROMPT, ""]).embeddings
    seconds = time.perf_counter() - start
    del encoder
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found[_PROMPT], found[""], seconds


def random_t5(width: int, device: torch.device) -> T5EncoderModel:
    """T5 v1.1 XXL's encoder in bf16, weights drawn on `device`; narrower ones have two layers."""
    config = T5Config(
        d_model=width,
        d_ff=width * 5 // 2,
        num_heads=width // 64,
        num_layers=24 if width == T5_WIDTH else 2,
        feed_forward_proj="gated-gelu",
        vocab_size=32128,
    )
    with torch.device("meta"):
        model = T5EncoderModel(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5)
    return model


class MadeUpWords:
    """Stands for T5's tokenizer: every text has as many tokens as training steps are measured with."""

    unk_token_id = 2
    eos_token_id = 1
    vocab_size = 32100

    def __call__(self, text: list[str], **options: Any) -> dict[str, list[list[int]]]:  # noqa: ANN401, ARG002 - a tokenizer's
        """Token ids."""
        return {"input_ids": [[*range(100, 99 + TEXT_TOKENS[0]), self.eos_token_id] for _ in text]}

    def convert_tokens_to_ids(self, tokens: str) -> int:  # noqa: ARG002 - of the protocol
        """Of the word boundary, the only one that is asked for."""
        return 3


def _adapter_file(dimensions: dict[str, int], rank: int, folder: Path) -> Path:
    """Of the names and shapes that training writes."""
    with init_empty_weights():
        transformer = MochiTransformer3DModel.from_config(dimensions)
    attach("mochi-lora", transformer, rank)
    draw = torch.Generator().manual_seed(0)
    places = lora.places_of(transformer, lora.TRAINED)
    tensors = {name: 0.01 * torch.randn(place.shape, generator=draw) for name, place in places.items()}
    path = folder / "adapter.safetensors"
    save_adapter(path, lora.Adapter(tensors, lora.plain_config(transformer.peft_config[lora.TRAINED]), "drawn"), {})
    return path


def _sampler(arguments: argparse.Namespace, plan: Plan, dimensions: dict[str, int]) -> LiveSampler:
    device = torch.device(plan.device)
    home = partial(home_of, depth=arguments.layers, plan=plan) if plan.block_swap else None
    transformer = random_transformer(dimensions, device=device, precision=plan.precision, home=home)
    small = {"decoder_block_out_channels": (arguments.channels,) * 4} if arguments.channels else {}
    vae = MochiVae(AutoencoderKLMochi(**small).eval().to("cpu" if plan.cpu_offload else device), precision="bf16")
    return LiveSampler(VelocityModel(transformer, plan), vae, device=device, offload=plan.cpu_offload)


def _waited(device: torch.device) -> float:
    """Now, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""What the lines of `encode.py` and `encode_work.py` have in common: their fields, their memory, the VAE that they run."""

import argparse
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLMochi
from train_step import FAILURES, GIB, in_a_line

from mochi_lora.model.vae import MochiVae
from mochi_lora.spec import Bucket


def buckets_of(arguments: argparse.Namespace) -> list[Bucket]:
    """The shapes asked for."""
    return [Bucket(frames, arguments.height, arguments.width) for frames in arguments.frames]


def measured(told: dict[str, Any], figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A whole line; what `figures` fails with is recorded instead of them."""
    try:
        return told | figures()
    except FAILURES as error:
        return told | {"error": in_a_line(error)}


def about(arguments: argparse.Namespace, what: str, bucket: Bucket | None, more: dict[str, Any]) -> dict[str, Any]:
    """The fields that every line has: what ran, and on what. `more` may replace parts of the plan."""
    plan = {"precision": arguments.precision, "chunk_elements": arguments.chunk, "cudnn_benchmark": arguments.cudnn_benchmark}
    return {
        "benchmark": "encode",
        "what": what,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "world_size": 1,
        "frames": bucket.frames if bucket else None,
        "height": bucket.height if bucket else None,
        "width": bucket.width if bucket else None,
        "plan": plan,
        "memory_cap_gib": arguments.memory_cap_gib,
        "channels": arguments.channels,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers", "av")},
        **more,
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Of the timed runs."""
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}


def forget_peaks(device: torch.device) -> None:
    """`peaks` says what comes after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: torch.device) -> dict[str, float | None]:
    """The most memory since `forget_peaks`."""
    if device.type != "cuda":
        return {"peak_gib": None, "allocated_gib": None}
    return {"peak_gib": torch.cuda.max_memory_reserved() / GIB, "allocated_gib": torch.cuda.max_memory_allocated() / GIB}


def our_vae(arguments: argparse.Namespace, device: torch.device, precision: Literal["bf16", "fp32"]) -> MochiVae:
    """As `encode` runs it."""
    return MochiVae(made_vae(arguments).to(device), precision=precision, chunk_elements=arguments.chunk)


def made_vae(arguments: argparse.Namespace) -> AutoencoderKLMochi:
    """The published dimensions are the class's defaults; --channels makes it small enough to try."""
    small: dict[str, Any] = {}
    if arguments.channels:
        widths = (arguments.channels,) * 4
        small = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths, "layers_per_block": (1,) * 5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLMochi(**small).requires_grad_(requires_grad=False).eval()

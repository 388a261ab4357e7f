"""Seconds and memory of encoding and decoding one clip with the full-size VAE, random weights; one JSON line per case.

    python benchmarks/encode.py                                # 37, 85 and 163 frames, both ways, diffusers and ours
    python benchmarks/encode.py --frames 163 --memory-cap-gib 23 --implementation mochi-lora

`diffusers` is the yardstick: its own layers, whole clips, float32 weights under autocast to encode and bf16 weights to
decode, mended as in `mochi_lora.model.vae_upstream` so that both compute the same function. `difference` is ours from the
yardstick's (relative, L2), `error` each one's from our float32 result (with --exact). No text encoder is loaded. Predictions
and outcomes belong into benchmarks/LOG.md.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLMochi

from mochi_lora.model.vae import CHUNK_ELEMENTS, MochiVae
from mochi_lora.model.vae_upstream import mend
from mochi_lora.spec import TRAINED_HEIGHT, TRAINED_WIDTH, Bucket

RESULTS = Path(__file__).parent / "results" / "encode.jsonl"
What = Literal["encode", "decode"]
Work = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    """Run every (task, implementation, frames) case; one VAE is on the device at a time."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.memory_cap_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(arguments.memory_cap_gib / total)
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    buckets = [Bucket(frames, arguments.height, arguments.width) for frames in arguments.frames]
    for what in arguments.what:
        exact = _results(_ours(arguments, what, device, "fp32"), what, buckets, device) if arguments.exact else {}
        stock: dict[Bucket, torch.Tensor] = {}
        for implementation in arguments.implementation:
            ours = implementation == "mochi-lora"
            work = _ours(arguments, what, device, arguments.precision) if ours else _stock(arguments, what, device)
            for bucket in buckets:
                line, result = measure(work, taken(what, bucket).to(device), arguments)
                line |= _agreement(result, stock.get(bucket) if ours else None, exact.get(bucket))
                if not ours:
                    stock[bucket] = result
                _write(arguments, {"what": what, "implementation": implementation}, bucket, line)
            del work
            _forget(device)


def measure(work: Work, clip: torch.Tensor, arguments: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    """Warm up, then time one clip after the other; the device is waited for at the end of each."""
    cuda = clip.is_cuda
    seconds, peaks, result = [], (0, 0), torch.empty(0)
    for number in range(arguments.warmup + arguments.steps):
        if cuda and number == arguments.warmup:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what compilation and the choice of kernels took is not a clip's
            torch.cuda.reset_peak_memory_stats()
        result = torch.empty(0)  # the last one's memory is not this one's
        start = time.perf_counter()
        result = work(clip)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if cuda:
        peaks = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated())
    timed = seconds[arguments.warmup :]
    line = {
        "clip_seconds": {"min": min(timed), "median": statistics.median(timed), "max": max(timed)},
        "first_clip_seconds": seconds[0],
        "steps": len(timed),
        "peak_gib": peaks[0] / 2**30 if cuda else None,
        "allocated_gib": peaks[1] / 2**30 if cuda else None,
        "finite": bool(torch.isfinite(result).all()),
    }
    return line, result.cpu()


def taken(what: What, bucket: Bucket) -> torch.Tensor:
    """What the task takes: noise, the same for everybody."""
    generator = torch.Generator().manual_seed(bucket.frames)
    if what == "encode":
        return torch.rand(3, bucket.frames, bucket.height, bucket.width, generator=generator) * 2 - 1
    return torch.randn(bucket.latent_shape, generator=generator)


def _results(work: Work, what: What, buckets: list[Bucket], device: torch.device) -> dict[Bucket, torch.Tensor]:
    found = {bucket: work(taken(what, bucket).to(device)).cpu() for bucket in buckets}
    _forget(device)
    return found


def _ours(arguments: argparse.Namespace, what: What, device: torch.device, precision: Literal["bf16", "fp32"]) -> Work:
    vae = MochiVae(_module(arguments).to(device), precision=precision, chunk_elements=arguments.chunk)
    if what == "decode":
        return vae.decode

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pixels)
        return torch.cat([posterior.mean, posterior.logvar])

    return encode


def _stock(arguments: argparse.Namespace, what: What, device: torch.device) -> Work:
    module = _module(arguments).to(device)
    mend(module)
    low = arguments.precision == "bf16"

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return module.encoder(pixels.unsqueeze(0))[0][0].float()

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return module.decoder(latents.unsqueeze(0).to(module.dtype))[0][0].float().clamp_(-1, 1)

    if what == "encode":
        return encode
    if low:
        module.to(torch.bfloat16)
    return decode


def _module(arguments: argparse.Namespace) -> AutoencoderKLMochi:
    """The published dimensions are the class's defaults; --channels makes it small enough to try."""
    small: dict[str, Any] = {}
    if arguments.channels:
        widths = (arguments.channels,) * 4
        small = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths, "layers_per_block": (1,) * 5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLMochi(**small).requires_grad_(requires_grad=False).eval()


def _agreement(result: torch.Tensor, stock: torch.Tensor | None, exact: torch.Tensor | None) -> dict[str, float | None]:
    def relative(expected: torch.Tensor | None) -> float | None:
        return None if expected is None else float((result - expected).norm() / expected.norm())

    return {"difference": relative(stock), "error": relative(exact)}


def _write(arguments: argparse.Namespace, case: dict[str, str], bucket: Bucket, line: dict[str, Any]) -> None:
    about = {
        "benchmark": "encode",
        **case,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "world_size": 1,
        "frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
        "precision": arguments.precision,
        "chunk_elements": arguments.chunk if case["implementation"] == "mochi-lora" else None,
        "cudnn_benchmark": arguments.cudnn_benchmark,
        "memory_cap_gib": arguments.memory_cap_gib,
        "channels": arguments.channels,
    }
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers")}
    text = json.dumps(about | line | {"versions": versions})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a") as stream:
        stream.write(text + "\n")
    print(text, flush=True)


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("encode", "decode"), default=["encode", "decode"])
    parser.add_argument("--implementation", nargs="+", choices=("diffusers", "mochi-lora"), default=["diffusers", "mochi-lora"])
    parser.add_argument("--frames", type=int, nargs="+", default=[37, 85, 163])
    parser.add_argument("--height", type=int, default=TRAINED_HEIGHT)
    parser.add_argument("--width", type=int, default=TRAINED_WIDTH)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--chunk", type=int, default=CHUNK_ELEMENTS, help="elements of a chunk's activation")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its kernels for every new shape")
    parser.add_argument("--exact", action="store_true", help="also the error from float32: slow, nothing of it is timed")
    parser.add_argument("--warmup", type=int, default=1, help="untimed clips of each shape")
    parser.add_argument("--steps", type=int, default=3, help="timed clips")
    parser.add_argument("--memory-cap-gib", type=float, help="torch.cuda.set_per_process_memory_fraction for the whole run")
    parser.add_argument("--channels", type=int, help="width of every level, one layer each, to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Seconds and memory of what `mochi-lora encode` does, full size, random weights; one JSON line per case.

    python benchmarks/encode.py                                # clips, latents, a folder of films, captions
    python benchmarks/encode.py --what encode --frames 163 --memory-cap-gib 23
    python benchmarks/encode.py --what folder --films 1280x720 1920x1080 --clips 24

`encode` and `decode`: one clip that lies on the device, ours and `diffusers`, the yardstick: its own layers, whole clips,
float32 weights under autocast to encode and bf16 weights to decode, mended as in `mochi_lora.model.vae_upstream` so that both
compute the same function. `difference` is between the two (relative, L2), in the line of whichever came second;
`error_from_fp32` each one's from our float32 result (with --exact). `folder` and `text`: `encode_work.py`. A case that runs
out of memory or fails is a line with its error. Predictions and outcomes belong into benchmarks/LOG.md.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from encode_lines import about, buckets_of, forget_peaks, made_vae, measured, our_vae, peaks, spread
from encode_work import folder_lines, text_lines
from train_step import RESULTS, STOCK, append, cap_memory

from mochi_lora.engine.allocator import expand_segments
from mochi_lora.model.vae import CHUNK_ELEMENTS
from mochi_lora.model.vae_upstream import mend
from mochi_lora.spec import TRAINED_HEIGHT, TRAINED_WIDTH, Bucket

Work = Callable[[torch.Tensor], torch.Tensor]
OURS = "mochi-lora"


def main() -> None:
    """Run every case; one model is on the device at a time."""
    expand_segments()
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cap_memory(arguments.memory_cap_gib, device)
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    for what in arguments.what:
        for line in _lines(what, arguments, device):
            append(arguments.output, line)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _lines(what: str, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    if what in ("encode", "decode"):
        return _vae_lines(what, arguments, device)
    return folder_lines(arguments, device) if what == "folder" else text_lines(arguments, device)


def _vae_lines(what: str, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    buckets = buckets_of(arguments)
    exact = _results(_ours(arguments, what, device, "fp32"), what, buckets, device) if arguments.exact else {}
    first: dict[Bucket, torch.Tensor] = {}
    for implementation in arguments.implementation:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        side = _Side(arguments, what, implementation, device)
        for bucket in buckets:
            told = about(arguments, what, bucket, {"implementation": implementation})
            told["plan"] |= {} if implementation == OURS else {"chunk_elements": None}
            yield measured(told, partial(side.figures, bucket, first, exact))
        del side


class _Side:
    """One implementation of a task; made when it is first measured, so that what fails then is a line's error."""

    def __init__(self, arguments: argparse.Namespace, what: str, implementation: str, device: torch.device) -> None:
        self._arguments, self._what, self._implementation, self._device = arguments, what, implementation, device
        self._work: Work | None = None

    def figures(self, bucket: Bucket, first: dict[Bucket, torch.Tensor], exact: dict[Bucket, torch.Tensor]) -> dict[str, Any]:
        """The measured fields of a line; `first` takes the result of whichever implementation comes first."""
        if self._work is None:
            self._work = self._made()
        line, result = measure(self._work, taken(self._what, bucket).to(self._device), self._arguments)
        agreement = {
            "difference": _distance(result, first.get(bucket)),
            "error_from_fp32": _distance(result, exact.get(bucket)),
        }
        first.setdefault(bucket, result)
        return line | agreement | {"tokens_per_second": bucket.tokens / line["clip_seconds"]["median"]}

    def _made(self) -> Work:
        if self._implementation == OURS:
            return _ours(self._arguments, self._what, self._device, self._arguments.precision)
        return _stock(self._arguments, self._what, self._device)


def measure(work: Work, clip: torch.Tensor, arguments: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    """Warm up, then time one clip after the other; the device is waited for at the end of each."""
    cuda = clip.is_cuda
    seconds, result = [], torch.empty(0)
    for number in range(arguments.warmup + arguments.steps):
        if number == arguments.warmup:
            forget_peaks(clip.device)  # what compilation and the choice of kernels took is not a clip's
        result = torch.empty(0)  # the last one's memory is not this one's
        start = time.perf_counter()
        result = work(clip)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    timed = seconds[arguments.warmup :]
    line = {
        "clip_seconds": spread(timed),
        "first_clip_seconds": seconds[0],
        "steps": len(timed),
        **peaks(clip.device),
        "finite": bool(torch.isfinite(result).all()),
    }
    return line, result.cpu()


def taken(what: str, bucket: Bucket) -> torch.Tensor:
    """What the task takes: noise, the same for everybody."""
    generator = torch.Generator().manual_seed(bucket.frames)
    if what == "encode":
        return torch.rand(3, bucket.frames, bucket.height, bucket.width, generator=generator) * 2 - 1
    return torch.randn(bucket.latent_shape, generator=generator)


def _results(work: Work, what: str, buckets: list[Bucket], device: torch.device) -> dict[Bucket, torch.Tensor]:
    return {bucket: work(taken(what, bucket).to(device)).cpu() for bucket in buckets}


def _ours(arguments: argparse.Namespace, what: str, device: torch.device, precision: Literal["bf16", "fp32"]) -> Work:
    vae = our_vae(arguments, device, precision)
    if what == "decode":
        return vae.decode

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pixels)
        return torch.cat([posterior.mean, posterior.logvar])

    return encode


def _stock(arguments: argparse.Namespace, what: str, device: torch.device) -> Work:
    module = made_vae(arguments).to(device)
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


def _distance(result: torch.Tensor, expected: torch.Tensor | None) -> float | None:
    return None if expected is None else float((result - expected).norm() / expected.norm())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = ("encode", "decode", "folder", "text")
    parser.add_argument("--what", nargs="+", choices=whats, default=list(whats))
    # Ours first: under a cap the yardstick runs out, and what it leaves behind is nobody else's trouble.
    parser.add_argument("--implementation", nargs="+", choices=(OURS, STOCK), default=[OURS, STOCK])
    parser.add_argument("--frames", type=int, nargs="+", default=[37, 85, 163])
    parser.add_argument("--height", type=int, default=TRAINED_HEIGHT)
    parser.add_argument("--width", type=int, default=TRAINED_WIDTH)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--chunk", type=int, default=CHUNK_ELEMENTS, help="elements of a chunk's activation")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its kernels for every new shape")
    parser.add_argument("--exact", action="store_true", help="also the error from float32: slow, nothing of it is timed")
    parser.add_argument("--warmup", type=int, default=1, help="untimed clips of each shape")
    parser.add_argument("--steps", type=int, default=3, help="timed clips")
    parser.add_argument(
        "--films", nargs="+", default=["1280x720", "1920x1080"], metavar="WxH", help="folder: sizes of the films"
    )
    parser.add_argument("--clips", type=int, default=24, help="folder: films of each size; text: captions")
    parser.add_argument("--read-ahead", type=int, help="folder: encode.read_ahead")
    parser.add_argument("--text-batch", type=int, nargs="+", default=[8], help="text: encode.text_batch")
    parser.add_argument("--text-width", type=int, help="text: T5's, to try it out")
    parser.add_argument("--memory-cap-gib", type=float, help="torch.cuda.set_per_process_memory_fraction for the whole run")
    parser.add_argument("--channels", type=int, help="width of every level, one layer each, to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS / "encode.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()

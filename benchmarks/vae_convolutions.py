"""TFLOP/s of the VAE's 3 x 3 x 3 convolutions, in the forms they could take; what `vae_floor.py` counts, in truth.

    python benchmarks/vae_convolutions.py

One row per width and picture size of the full-size encoder and decoder at 480x848, on one chunk as `mochi_lora.model.vae`
cuts it. Forms: `last` is the one in use (channels last); `first` is diffusers' layout; `planes` writes three neighbouring
frames side by side and calls a two-dimensional convolution, the copy included. Each with cuDNN's own choice of kernel, then
with cudnn.benchmark.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from mochi_lora.model.vae import CHUNK_ELEMENTS
from mochi_lora.model.vae_layers import convolved

LEVELS = ((64, 1), (128, 2), (256, 4), (384, 8), (768, 8), (512, 4), (256, 2), (128, 1))  # width, reduction of the picture
Form = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def first(padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[1, C, T+2, H+2, W+2] with weight [C', C, 3, 3, 3] -> [1, C', T, H, W]."""
    return F.conv3d(padded, weight)


def planes(padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T+2, H+2, W+2, C] with weight [C', 3C, 3, 3], time before channels -> [T, C', H, W], channels last."""
    stacked = torch.cat([padded[:-2], padded[1:-1], padded[2:]], dim=-1)
    return F.conv2d(stacked.permute(0, 3, 1, 2), weight)


def seconds(form: Form, padded: torch.Tensor, weight: torch.Tensor, repeats: int) -> float:
    """Of one call, after two that warm up."""
    for _ in range(2):
        form(padded, weight)
    _wait(padded)
    start = time.perf_counter()
    for _ in range(repeats):
        form(padded, weight)
    _wait(padded)
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def main() -> None:
    """Print the table; a CPU is for trying it out with --height and --width small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--chunk", type=int, default=CHUNK_ELEMENTS, help="elements of a chunk's activation")
    parser.add_argument("--frames", type=int, default=28, help="of a chunk at most; the clip's, at the lowest level")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; TFLOP/s without and with cudnn.benchmark")
    for width, reduction in LEVELS:
        height, breadth = arguments.height // reduction, arguments.width // reduction
        frames = max(1, min(arguments.frames, arguments.chunk // (width * height * breadth)))
        padded = torch.randn(frames + 2, height + 2, breadth + 2, width, device=device, dtype=torch.bfloat16)
        weight = torch.randn(width, width, 3, 3, 3, device=device, dtype=torch.bfloat16) / (27 * width) ** 0.5
        flops = 2 * frames * height * breadth * weight.numel()
        flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        last = weight.contiguous(memory_format=torch.channels_last_3d)
        contiguous = padded.permute(3, 0, 1, 2).unsqueeze(0).contiguous()
        found = []
        for form in (
            partial(seconds, convolved, padded, last),
            partial(seconds, first, contiguous, weight),
            partial(seconds, planes, padded, flat),
        ):
            for search in (False, True):
                with torch.backends.cudnn.flags(enabled=True, benchmark=search):
                    found.append(flops / form(arguments.repeats) / 1e12)
        text = "  ".join(
            f"{name} {plain:6.1f} {searched:6.1f}"
            for name, plain, searched in zip(("last", "first", "planes"), found[::2], found[1::2], strict=True)
        )
        print(f"{width:4} channels, {frames:2} x {height} x {breadth}: {text}", flush=True)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

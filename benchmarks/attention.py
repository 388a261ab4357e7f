"""Milliseconds and TFLOP/s of every attention kernel, forward and backward, and what a first caption length costs. JSON lines.

    python benchmarks/attention.py
    python benchmarks/attention.py --frames 37 --kernels cudnn flash4 --new-lengths 8

Shapes are Mochi's at 480x848: 24 heads of 128, bf16, visual tokens and 120 of text. `new_length_ms` is the first forward and
backward on a text length never seen less the second one on it (median, and the largest): cuDNN builds two plans there, one
for each direction, and a third where the backward pass recomputes the attention, whose thread has a cache of its own.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from mochi_lora.engine.kernel_choice import CANDIDATES, KernelTime, Shape, measure_kernels, random_tokens, time_attention
from mochi_lora.engine.kernels import Attention
from mochi_lora.spec import Bucket

RESULTS = Path(__file__).parent / "results" / "attention.jsonl"
HEADS, HEAD_SIZE, TEXT_TOKENS = 24, 128, 120


def main() -> None:
    """One line for each kernel and number of frames, written as soon as it is measured."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for frames in arguments.frames:
        visual = Bucket(frames, arguments.height, arguments.width).tokens
        shape = (arguments.batch, visual + TEXT_TOKENS, arguments.heads, HEAD_SIZE)
        for kernel in arguments.kernels:
            (row,) = measure_kernels(device, dtype, shape, [kernel])
            line = _line(row, shape, device) | {"frames": frames, "dtype": str(dtype)}
            if row.refused is None and arguments.new_lengths:
                line["new_length_ms"] = new_length_cost(kernel, device, dtype, shape, arguments.new_lengths)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


def new_length_cost(kernel: Attention, device: torch.device, dtype: torch.dtype, shape: Shape, count: int) -> dict[str, float]:
    """Extra milliseconds of the first pass over each of `count` lengths beyond `shape`'s, none of which was seen before."""
    batch, size, heads, head_size = shape
    extra = []
    for longer in range(1, count + 1):
        qkv, grad = random_tokens(device, dtype, (batch, size + longer, heads, head_size))
        first, second = (sum(time_attention(kernel, qkv, grad)) for _ in range(2))
        extra.append(first - second)
    return {"median": statistics.median(extra), "max": max(extra)}


def _line(row: KernelTime, shape: Shape, device: torch.device) -> dict[str, object]:
    line: dict[str, object] = {
        "benchmark": "attention",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)",
        "torch": torch.__version__,
        "shape": shape,
    }
    if row.refused is not None:
        return line | {"attention": row.attention, "refused": row.refused}
    batch, size, heads, head_size = shape
    operations = 4 * batch * heads * size**2 * head_size  # of the forward; the backward has 2.5 times as many
    rates = {
        "forward_tflops": operations / row.forward_ms / 1e9,
        "backward_tflops": 2.5 * operations / row.backward_ms / 1e9,
    }
    return line | asdict(row) | rates


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[37, 85, 163])
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--kernels", nargs="+", default=list(CANDIDATES), choices=["auto", *CANDIDATES, "math"])
    parser.add_argument("--new-lengths", type=int, default=4, help="text lengths to meet for the first time; 0 leaves that out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

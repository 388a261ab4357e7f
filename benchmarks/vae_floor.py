"""What encoding and decoding cost at least: arithmetic, memory traffic and peak memory of every kind of layer, by count.

    python benchmarks/vae_floor.py --frames 37 163

Nothing is timed and no GPU is needed: the full-size VAE runs on torch's `meta` device, which has shapes and no numbers.
Each operation is charged the larger of its arithmetic at --tflops and its tensors, each read or written once, at --tbps.
Element-wise passes that are compiled on a GPU count as one operation. The peak is that of tensors; cuDNN's work space and
what the allocator cannot use again come on top.
"""

import argparse
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLMochi
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mochi_lora.model import vae_kernels, vae_layers, vae_network
from mochi_lora.model.vae import CHUNK_ELEMENTS, MochiVae
from mochi_lora.spec import TRAINED_HEIGHT, TRAINED_WIDTH, Bucket

GIB = 2**30
_FREE = {"view", "slice", "permute", "transpose", "expand", "unsqueeze", "select", "split", "unbind", "t", "_unsafe_view"}
_FREE |= {"empty", "new_empty", "detach", "alias", "as_strided", "split_with_sizes"}
_PRODUCTS = {"addmm", "mm"}


@dataclass
class Cost:
    """Of all operations of one kind at one width and picture size."""

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Count(TorchDispatchMode):
    """Charges every operation that runs inside, and follows the memory of what they return."""

    flops_per_second: float
    bytes_per_second: float
    costs: dict[tuple[str, int], Cost] = field(default_factory=lambda: defaultdict(Cost))
    live: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref] = {}
        self._hidden = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._hidden:
            return out
        name = func.overloadpacket.__name__
        self._follow(out)
        if name not in _FREE:
            formula = flop_registry.get(func.overloadpacket)
            self.charge(name, args, out, formula(*args, **kwargs, out_val=out) if formula else 0)
        return out

    def charge(self, name: str, args: object, out: object, flops: float) -> None:
        """One operation over `args` and `out`."""
        tensors = [leaf for leaf in (*tree_leaves(args), *tree_leaves(out)) if isinstance(leaf, torch.Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        largest = max(tensors, key=torch.Tensor.numel)
        cost = self.costs["product" if name in _PRODUCTS else name, int(largest.shape[-1])]
        cost.calls += 1
        cost.flops += flops
        cost.bytes += size
        cost.seconds += max(flops / self.flops_per_second, size / self.bytes_per_second)

    def opaque(self, name: str, function: Callable[..., Any], flops: Callable[..., float]) -> Callable[..., Any]:
        """`function` as one operation: its inner tensors cost nothing."""

        def call(*args: Any, **words: Any) -> Any:  # noqa: ANN401
            self._hidden = True
            out = function(*args, **words)
            self._hidden = False
            self._follow(out)
            self.charge(name, args, out, flops(*args))
            return out

        return call

    def _follow(self, out: object) -> None:
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                continue

            def gone(_: object, key: int = key, size: int = size) -> None:
                self._known.pop(key)
                self.live -= size

            self._known[key] = weakref.ref(storage, gone)
            self.live += size
            self.peak = max(self.peak, self.live)


@contextmanager
def counting(count: Count) -> Iterator[None]:
    """Within, the VAE's compiled passes and its attention are one operation each."""
    passes = [name for name, value in vars(vae_kernels).items() if hasattr(value, "__wrapped__")]
    with count:
        patches = [
            patch.object(room, name, count.opaque(name, getattr(room, name), lambda *_: 0.0))
            for room in (vae_layers, vae_network)
            for name in passes
            if hasattr(room, name)
        ]
        attention = count.opaque("attention", lambda q, *_, **__: torch.empty_like(q), _attention_flops)
        patches.append(patch.object(vae_layers.F, "scaled_dot_product_attention", attention))
        patches.append(patch.object(vae_layers, "convolved", count.opaque("convolution", _convolved, _convolution_flops)))
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


def _attention_flops(q: torch.Tensor, k: torch.Tensor, _: torch.Tensor) -> float:
    return 2.0 * q.numel() * k.shape[2]  # two products, and half of each is in the future


def _convolved(padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The result's shape, in the layout cuDNN gives it; `meta` tensors would come out in another."""
    frames, height, width, _ = padded.shape
    return padded.new_empty(frames - 2, height - 2, width - 2, len(weight))


def _convolution_flops(padded: torch.Tensor, weight: torch.Tensor) -> float:
    frames, height, width, _ = padded.shape
    return 2.0 * (frames - 2) * (height - 2) * (width - 2) * weight.numel()


def floor(what: str, bucket: Bucket, chunk_elements: int, count: Count) -> float:
    """Fill `count` from one encoding or decoding; GiB at the peak, with the weights of both and what is given."""
    with torch.device("meta"):
        vae = MochiVae(AutoencoderKLMochi(), precision="bf16", chunk_elements=chunk_elements)
        taken = (3, bucket.frames, bucket.height, bucket.width) if what == "encode" else bucket.latent_shape
        clip = torch.empty(taken)
    weights = [*vae._encoder.buffers(), *vae._decoder.buffers()]
    resident = sum(weight.numel() * weight.element_size() for weight in weights)
    with counting(count):
        getattr(vae, what)(clip)
    return (resident + clip.numel() * clip.element_size() + count.peak) / GIB


def main() -> None:
    """Print a table per task and number of frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("encode", "decode"), default=["encode", "decode"])
    parser.add_argument("--frames", type=int, nargs="+", default=[37, 85, 163])
    parser.add_argument("--height", type=int, default=TRAINED_HEIGHT)
    parser.add_argument("--width", type=int, default=TRAINED_WIDTH)
    parser.add_argument("--chunk", type=int, default=CHUNK_ELEMENTS, help="elements of a chunk's activation")
    parser.add_argument("--tflops", type=float, default=700, help="bf16 matrix products, dense, as measured")
    parser.add_argument("--tbps", type=float, default=4.3, help="memory bandwidth, read and write together, as measured")
    arguments = parser.parse_args()
    for what in arguments.what:
        for frames in arguments.frames:
            bucket = Bucket(frames, arguments.height, arguments.width)
            count = Count(arguments.tflops * 1e12, arguments.tbps * 1e12)
            peak = floor(what, bucket, arguments.chunk, count)
            _print(f"{what} {bucket}", count, peak)


def _print(title: str, count: Count, peak: float) -> None:
    rows = sorted(count.costs.items(), key=lambda item: -item[1].seconds)
    total = Cost(
        sum(cost.calls for _, cost in rows),
        sum(cost.flops for _, cost in rows),
        sum(cost.bytes for _, cost in rows),
        sum(cost.seconds for _, cost in rows),
    )
    sums = f"{total.flops / 1e12:.0f} TFLOP, {total.bytes / 1e12:.2f} TB, {peak:.1f} GiB"
    print(f"\n{title}: at least {total.seconds:.3f} s, {sums}")
    print(f"{'operation':22} {'width':>6} {'calls':>6} {'TFLOP':>8} {'GB':>8} {'ms':>8}")
    for (name, width), cost in rows:
        if cost.seconds > total.seconds / 200:
            figures = f"{cost.flops / 1e12:8.1f} {cost.bytes / 1e9:8.1f} {cost.seconds * 1e3:8.1f}"
            print(f"{name:22} {width:6} {cost.calls:6} {figures}")


if __name__ == "__main__":
    main()

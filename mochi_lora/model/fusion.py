"""Element-wise work of the VAE as single kernels on a GPU. Owns what is compiled, and for which shapes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
# A kernel per layer width, picture size and whether there is one frame or more; torch's own limit is 8 per function.
_KERNELS_PER_FUNCTION = 512


def fused(moving: int) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Compile the function where its first argument lies on a GPU; on a CPU it is called as it stands.

    The first `moving` dimensions of every tensor of two or more dimensions may take any size without another compilation;
    the others are constants of the kernel: dividing every index by a variable would cost more than the memory's bandwidth.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @wraps(function)
        def call(*args: Parameters.args, **words: Parameters.kwargs) -> Result:
            first = args[0]
            assert isinstance(first, torch.Tensor)
            if first.device.type != "cuda":
                return function(*args, **words)
            return compiled(function, moving)(*args, **words)

        return call

    return decorate


@cache
def compiled(function: Callable[..., Any], moving: int) -> Callable[..., Any]:
    """`function` as compiled code for any device. Call it inside `room_for_kernels`."""
    quick = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*args: Any, **words: Any) -> Any:  # noqa: ANN401 - whatever `function` takes and gives
        for tensor in args:
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1:
                for dimension in range(moving):
                    if tensor.shape[dimension] > 1:  # a size of 1 broadcasts: torch makes a kernel of its own for it
                        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        return quick(*args, **words)

    return call


@contextmanager
def room_for_kernels(device: torch.device) -> Iterator[None]:
    """Within, a compiled function may have as many kernels as it meets shapes; one too many is an error, not a slow path."""
    if device.type != "cuda":  # nothing is compiled; loading torch's compiler alone takes seconds
        yield
        return
    limits = {"recompile_limit": _KERNELS_PER_FUNCTION, "accumulated_recompile_limit": _KERNELS_PER_FUNCTION}
    with torch._dynamo.config.patch({**limits, "fail_on_recompile_limit_hit": True}):
        yield

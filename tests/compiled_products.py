"""What a compiled pair of quantised linears keeps for its backward."""

from collections.abc import Callable

import torch
from inputs import normal, relative
from torch import nn


class Gated(nn.Module):
    """Two projections with something element-wise around them; `make(in, out)` makes each."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.wide, self.narrow = make(64, 128), make(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(nn.functional.silu(self.wide(nn.functional.rms_norm(x, (64,)))))


def kept_when_compiled(module: Gated) -> list[torch.Tensor]:
    """What the compiled forward saves; checks that there is no graph break and that the gradient is the eager one."""
    torch._dynamo.reset()
    kept: list[torch.Tensor] = []
    x = normal(2, 24, 64).bfloat16().requires_grad_()
    module(x).float().square().sum().backward()
    expected, x.grad = x.grad, None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = compiled(x)
    result.float().square().sum().backward()
    assert relative(x.grad, expected) < 1e-2
    return kept

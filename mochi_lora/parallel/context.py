"""Context parallelism in the manner of DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): tokens are cut over the ranks
outside of attention, heads inside.

Each context rank holds V / C of the visual tokens and the whole text stream. Before attention one all-to-all hands q, k and v
of the visual tokens from token parts to head parts; text's heads are cut in place. After it one all-to-all hands the visual
rows back and gives every rank all heads of the text. Both are their own adjoint, so gradients are exact: each rank ends with
the part that its own tokens, its own heads of its own text stream and its own rows of the loss contribute, and their *sum*
over the ranks is the gradient, of the text stream's parameters too. (Averaging, as DDP does, would give 1 / C of it.)

Shape legend: B = samples, V = visual tokens of the whole sample, L = padded text tokens, H = heads, D = head size, C = ranks.

Checkpointing: an all-to-all is an operator of its own, and no mode but `none` keeps its result: the backward repeats both
(3 % of a step's time at 37 frames and 1 % at 163, predicted for two ranks over NVLink, against 4 x V / C vectors a block kept).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from mochi_lora.parallel.mesh import Ranks


def _group_of(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(cast("Any", name))  # a type of its own since torch 2.13


@torch.library.custom_op("mochi_lora::exchange", mutates_args=())
def exchange(parts: torch.Tensor, group: str) -> torch.Tensor:
    """All-to-all of [C, ...]: part i goes to rank i of the group of this name, and part i of the result came from rank i."""
    received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    dist.all_to_all_single(received, parts.contiguous(), group=_group_of(group))
    return received


@exchange.register_fake
def _exchange_fake(parts: torch.Tensor, _: str) -> torch.Tensor:
    return parts.new_empty(parts.shape)


def _keep_group(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:  # noqa: ANN401, ARG001 - torch's own
    ctx.group = inputs[1]


def _send_back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401 - torch's own signature
    return exchange(grad, ctx.group), None


exchange.register_autograd(_send_back, setup_context=_keep_group)


class _Gather(torch.autograd.Function):
    """Token parts to the whole on every rank; every rank computes the same loss from it, so each takes its own part back."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # noqa: ANN401
        ctx.rank, ctx.size = group.rank(), part.shape[1]
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        return grad.narrow(1, ctx.rank * ctx.size, ctx.size), None


@dataclass(frozen=True)
class ContextRanks:
    """The ranks that share one sample's tokens, and which of them this is."""

    size: int
    rank: int
    group: str  # its name: what an operator in a compiled graph can be told

    @classmethod
    def of(cls, ranks: Ranks) -> "ContextRanks | None":
        """None where a sample is whole."""
        if ranks.context_group is None:
            return None
        return cls(ranks.layout.context, ranks.context_rank, ranks.context_group.group_name)

    def part(self, count: int) -> slice:
        """This rank's of `count` tokens."""
        assert count % self.size == 0, f"{count} tokens over {self.size} ranks"
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """[B, V / C, ...] -> [B, V, ...], the same on every rank. Whatever comes after must be computed alike by all."""
        whole: torch.Tensor = _Gather.apply(part, _group_of(self.group))
        return whole

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of this tensor over the ranks, whose parts are equally large; without gradient."""
        values = values.clone()
        dist.all_reduce(values, group=_group_of(self.group))
        return values / self.size

    def to_heads(self, visual: torch.Tensor) -> torch.Tensor:
        """[N, B, V / C, H, D], all heads of this rank's tokens -> [N, B, V, H / C, D], its heads of all tokens."""
        by_head = visual.unflatten(3, (self.size, -1)).permute(3, 0, 1, 2, 4, 5)
        return exchange(by_head, self.group).permute(1, 2, 0, 3, 4, 5).flatten(2, 3)

    def own_heads(self, text: torch.Tensor) -> torch.Tensor:
        """[B, L, H, D] -> [B, L, H / C, D]."""
        return text.unflatten(2, (self.size, -1))[:, :, self.rank]

    def to_tokens(self, joint: torch.Tensor, visual: int) -> torch.Tensor:
        """[B, V + L, H / C, D], `visual` = V -> [B, V / C + L, H, D]: this rank's visual rows and all of the text's."""
        rows, text = joint.split_with_sizes((visual, joint.shape[1] - visual), dim=1)
        rows = rows.unflatten(1, (self.size, -1)).movedim(1, 0)
        parts = torch.cat([rows, text.expand(self.size, *text.shape)], dim=2)  # [C, B, V / C + L, H / C, D]
        return exchange(parts, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)

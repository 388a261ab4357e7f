"""Which processes of a launch do what: data ranks read different samples, context ranks share one sample's tokens, shard
ranks hold a part of the frozen base each.

    world = data x context; rank = data rank x context + context rank
    ranks of one context group are neighbours; so are the `shard` ranks that hold one copy of the base between them

A shard rank is a data or a context rank besides: sharding changes where frozen weights lie, never who computes what. What is
trained is whole on every rank, so a checkpoint of rank 0 is complete and any layout can go on from it.

Why not DeviceMesh: `shard` is no axis of a mesh but lies across the other two, and one call per size makes the groups. Why not
DCP (`torch.distributed.checkpoint`): it saves and reshards what is in pieces, and nothing that is saved is; a checkpoint stays
a few plain files with checksums, which one process writes. Why no ring attention beside Ulysses (`parallel.context`): it would
serve numbers of ranks that do not divide the heads, and 24 heads divide by 2, 3, 4, 6 and 8.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from math import lcm
from operator import itemgetter
from typing import TypeVar

import torch
import torch.distributed as dist

from mochi_lora.config.engine import parallel_sizes
from mochi_lora.errors import UserError
from mochi_lora.spec import Bucket

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How a launch of `world` processes is cut."""

    world: int = 1
    context: int = 1
    shard: int = 1

    @property
    def data(self) -> int:
        """Data ranks: samples that are worked on at a time, per unit of batch size."""
        return self.world // self.context

    @property
    def together(self) -> bool:
        """Whether a forward pass is a collective: then every rank must run as many of them as every other."""
        return self.context > 1 or self.shard > 1

    def __str__(self) -> str:
        """As the setting is written."""
        sizes = {"data": self.data, "context": self.context, "shard": self.shard}
        return ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1) or "data:1"


def layout_of(setting: str, world: int) -> Layout:
    """`engine.parallel` for a launch of `world` processes; auto is data alone. Raises UserError where it does not come out."""
    sizes = parallel_sizes(setting)
    context, shard = sizes.get("context", 1), sizes.get("shard", 1)
    data = sizes.get("data", max(1, world // context))
    if data * context != world:
        launch = "1 process" if world == 1 else f"{world} processes"
        message = (
            f"engine.parallel: got {setting} for a launch of {launch}; expected data x context = {world}, "
            f"here it is {data} x {context}. Start {data * context} processes (accelerate launch, torchrun), or change the "
            "sizes; auto takes any number"
        )
        raise UserError(message)
    if world % shard:
        message = f"engine.parallel: got {setting}; expected shard to divide the {world} processes of this launch"
        raise UserError(f"{message}; take one of {_list(size for size in range(1, world + 1) if world % size == 0)}")
    return Layout(world, context, shard)


def least_world(setting: str) -> int:
    """The fewest processes that `engine.parallel` can mean; auto is one."""
    sizes = parallel_sizes(setting)
    together = sizes.get("data", 1) * sizes.get("context", 1)
    return together if "data" in sizes else lcm(together, sizes.get("shard", 1))


def layouts_of(world: int) -> list[Layout]:
    """The ways to cut a launch that are worth comparing: all data, context of each size, the base over all, and both."""
    contexts = [Layout(world, context=size) for size in range(2, world + 1) if world % size == 0]
    split = [Layout(world, shard=world), Layout(world, context=world, shard=world)] if world > 1 else []
    return [Layout(world), *contexts, *split]


def check_layout(layout: Layout, heads: int, buckets: Iterable[Bucket], *, step_cache: float = 0.0) -> None:
    """Raises UserError unless the model's heads and every shape's visual tokens divide by the context ranks, and unless ranks
    that share a base run the blocks equally often: what `sample.step_cache` spares depends on the video.
    """
    if step_cache and layout.context % layout.shard:
        message = f"sample.step_cache: got {step_cache:g} with engine.parallel {layout}, where ranks that share the base make"
        raise UserError(f"{message} different videos and spare other steps; set it to 0, or take a shard that divides context")
    if heads % layout.context:
        message = f"engine.parallel: context:{layout.context} does not divide the model's {heads} heads"
        raise UserError(f"{message}; take one of {_list(_common_divisors(heads, heads))}")
    for bucket in sorted(set(buckets)):
        if bucket.tokens % layout.context:
            message = f"engine.parallel: context:{layout.context} does not divide the {bucket.tokens} visual tokens of {bucket}"
            fitting = _list(_common_divisors(heads, bucket.tokens))
            raise UserError(f"{message}; take one of {fitting}, or another number of frames or another size")


def _common_divisors(heads: int, tokens: int) -> Iterable[int]:
    return (size for size in range(1, heads + 1) if heads % size == 0 and tokens % size == 0)


def _list(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))


@dataclass(frozen=True)
class Ranks:
    """This process's place in the layout, with the groups it talks in; None where a group is itself alone."""

    layout: Layout = Layout()
    rank: int = 0
    context_group: dist.ProcessGroup | None = None
    shard_group: dist.ProcessGroup | None = None

    @property
    def data_rank(self) -> int:
        """Which samples are this process's."""
        return self.rank // self.layout.context

    @property
    def context_rank(self) -> int:
        """Which part of a sample's tokens is this process's."""
        return self.rank % self.layout.context

    @property
    def shard_rank(self) -> int:
        """Which part of the frozen base is this process's."""
        return self.rank % self.layout.shard

    def own(self, count: int) -> list[int]:
        """Numbers below `count` that this process works on.

        Where passes are collectives every rank has equally many: one whose share is short repeats the last number, which
        `keeps` gives to somebody else.
        """
        mine = list(range(self.data_rank, count, self.layout.data))
        if self.layout.together and count:
            most = -(-count // self.layout.data)
            mine += [count - 1] * (most - len(mine))
        return mine

    def keeps(self, number: int) -> bool:
        """Whether the result for `number` is this process's to keep: one process of all says yes."""
        return number % self.layout.data == self.data_rank and self.context_rank == 0


ALONE = Ranks()


def open_ranks(layout: Layout, timeout_minutes: float) -> Ranks:
    """This process's place; makes the groups, on every process at the same time. A peer that is gone for so long is lost."""
    if layout.world == 1:
        return ALONE
    assert dist.get_world_size() == layout.world, f"{dist.get_world_size()} processes, {layout}"
    timeout = timedelta(minutes=timeout_minutes)
    groups = {size: dist.new_subgroups(size, timeout=timeout)[0] for size in sorted({layout.context, layout.shard} - {1})}
    return Ranks(layout, dist.get_rank(), groups.get(layout.context), groups.get(layout.shard))


def gathered(items: list[T], group: dist.ProcessGroup | None = None) -> list[T]:
    """The items of all processes, in order of rank, on each of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return items
    told: list[list[T]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(told, items, group=group)
    return list(chain.from_iterable(told))


def share_out(works: Sequence[Callable[[], T]], ranks: Ranks) -> list[T]:
    """What each of `works` gives, in their order, on every process; one data rank does each."""
    mine = [(number, works[number]()) for number in ranks.own(len(works))]
    kept = gathered([(number, found) for number, found in mine if ranks.keeps(number)])
    return [found for _, found in sorted(kept, key=itemgetter(0))]


@torch.no_grad()
def reduce_gradients(parameters: Sequence[torch.Tensor], loss: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Gradients of the step on every rank, and its mean loss: one flat all-reduce over the launch.

    Context ranks compute one loss on parts of one sample, so their gradients are summed; data ranks' are averaged. `loss` is
    this rank's mean; every rank has equally many samples in every step (`data.plan`), so a mean of means is exact. All
    parameters are float32 and on one device.
    """
    if layout.world == 1:
        return loss
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None, "every trained parameter takes part in every step"
        gradients.append(parameter.grad)
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), (loss / layout.context).reshape(1)])
    dist.all_reduce(flat)
    flat /= layout.data
    for parameter, part in zip(parameters, flat.split([*(gradient.numel() for gradient in gradients), 1])[:-1], strict=True):
        parameter.grad = part.view_as(parameter)
    return flat[-1].clone()


@torch.no_grad()
def make_alike(tensors: Sequence[torch.Tensor], layout: Layout) -> None:
    """Give every rank the first one's values; what is drawn may differ between kinds of machine."""
    if layout.world == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, 0)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))

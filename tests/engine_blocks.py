"""A few blocks of a tiny Mochi with an adapter past its start, their inputs, and what one step of them gives."""

from collections.abc import Callable, Sequence

import torch
from diffusers import MochiTransformer3DModel
from inputs import normal

from mochi_lora.config.schema import AdapterConfig
from mochi_lora.engine.attention import install_attention
from mochi_lora.engine.blocks import wrap_blocks
from mochi_lora.engine.checkpoints import Block
from mochi_lora.engine.joint_block import install_blocks
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.transfer import Copied
from mochi_lora.model.adapter import attach
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.weights import random_transformer

CPU = torch.device("cpu")
Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


def transformer(layers: int = 3, *, dropout: float = 0.0, attached: bool = True) -> MochiTransformer3DModel:
    """The same weights at every call; unless it is not attached, the adapter's B is not zero."""
    made = random_transformer(TRANSFORMER | {"num_layers": layers}, device=CPU, precision="fp32")
    install_attention(made, "auto")
    if attached:
        adapt(made, dropout=dropout)
    return made.train()


def adapt(made: MochiTransformer3DModel, *, dropout: float = 0.0) -> None:
    attach(made, AdapterConfig(rank=4, dropout=dropout, targets="joint_attention_mlp"), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    made.train()


def wrapped(made: MochiTransformer3DModel, checkpointing: str = "none", **settings: object) -> Sequence[Block]:
    install_blocks(made.transformer_blocks)
    return wrap_blocks(made.transformer_blocks, Plan("cpu", "fp32", "auto", checkpointing, **settings)).calls


def streams(visual: int = 12, lengths: tuple[int, ...] = (5,)) -> tuple:
    """Arguments of the first block: visual, text, conditioning, lengths, rotary tables."""
    batch, rotary = len(lengths), tuple(normal(visual, 6, 16, seed=seed) for seed in (4, 5))
    text = normal(batch, max(1, *lengths), 96, seed=2)
    return normal(batch, visual, 192), text, normal(batch, 192, seed=3), lengths, rotary


def forward(calls: Sequence[Block], given: tuple) -> torch.Tensor:
    visual, text, *rest = given
    for call in calls:
        visual, text = call(visual, text, *rest)
    return visual


def step(made: MochiTransformer3DModel, calls: Sequence[Block], given: tuple | None = None) -> Step:
    """Output and adapter gradients of one forward and backward pass."""
    torch.manual_seed(7)
    output = forward(calls, streams() if given is None else given)
    output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    made.zero_grad()
    return output.detach(), gradients


def expected(given: tuple | None = None, layers: int = 3, *, dropout: float = 0.0) -> Step:
    """Of the same blocks, nothing wrapped around them."""
    made = transformer(layers, dropout=dropout)
    return step(made, list(made.transformer_blocks), given)


def assert_same(one: Step, other: Step) -> None:
    """To the last bit."""
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert len(one[1]) > 0
    assert [name for name, gradient in one[1].items() if not torch.equal(gradient, other[1][name])] == []


class LateLane:
    """A `CopyLane` at its worst: a copy ruins its target when it is begun, and arrives when it is waited for, not before."""

    def __init__(self, device: torch.device) -> None:
        pass

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> "LateCopy":
        for target, _ in pairs:
            target.fill_(torch.nan)
        return LateCopy(lambda: [target.copy_(source) for target, source in pairs])


class LateCopy(Copied):
    def __init__(self, arrive: Callable[[], object]) -> None:
        super().__init__(None)
        self._arrive: Callable[[], object] | None = arrive

    def wait(self) -> None:
        arrive, self._arrive = self._arrive, None
        if arrive is not None:
            with torch.no_grad():
                arrive()

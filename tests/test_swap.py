"""Blocks whose weights come from the host: right values whenever they are used, two places, and one fetch ahead."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from engine_blocks import CPU, LateLane, adapt, assert_same, expected, forward, step, streams, transformer, wrapped
from inputs import SHAPE, captions, normal
from torch import nn

from mochi_lora.engine import swap as room
from mochi_lora.engine.blocks import wrap_blocks
from mochi_lora.engine.checkpoints import run_block
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.swap import BlockSwap, home_of, swapped_blocks
from mochi_lora.engine.transfer import CopyLane
from mochi_lora.model.step_cache import StepCache
from mochi_lora.model.transformer import VelocityModel

LAYERS = 5


@pytest.mark.parametrize("lane", [CopyLane, LateLane])
@pytest.mark.parametrize(
    ("count", "checkpointing"),
    [
        (1, "none"),
        (2, "full"),
        (3, "none"),
        (3, "offload"),
        (LAYERS, "none"),
        (LAYERS, "attention_saved"),
        (LAYERS, "offload:2,none"),
    ],
)
def test_swapping_changes_no_gradient(monkeypatch, lane: type, count: int, checkpointing: str) -> None:
    """Two steps with sampling in between: the places are overwritten in the forward, the backward and the sampling."""
    monkeypatch.setattr(room, "CopyLane", lane)
    reference = expected(layers=LAYERS)
    made = transformer(LAYERS)
    calls = wrapped(made, checkpointing, block_swap=count)
    for _ in range(2):
        assert_same(step(made, calls), reference)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(forward(calls, streams()), reference[0])


def test_two_forward_passes_may_come_before_their_backward(monkeypatch) -> None:
    monkeypatch.setattr(room, "CopyLane", LateLane)
    found = []
    for settings in ({}, {"block_swap": 3}):
        made = transformer(LAYERS)
        calls = wrapped(made, "full", **settings)
        first, second = (forward(calls, streams(size)) for size in (12, 8))
        first.square().mean().backward()
        second.square().mean().backward()
        gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        found.append((first.detach(), gradients))
    assert_same(*found)


def test_an_adapter_attached_afterwards_trains_the_same() -> None:
    made = transformer(LAYERS, attached=False)
    calls = wrapped(made, "full", block_swap=3)
    adapt(made)
    assert_same(step(made, calls), expected(layers=LAYERS))


class Log:
    """What happened, in order: `fetch 2` (of the swapped blocks), `run 3` (any block, the second time too)."""

    def __init__(self, monkeypatch, count: int) -> None:
        self.events: list[str] = []
        monkeypatch.setattr(room.BlockSwap, "_fetch", self._logged(room.BlockSwap._fetch))
        self.made = transformer(LAYERS)
        self.calls = wrapped(self.made, "full", block_swap=count)
        for index, block in enumerate(self.made.transformer_blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self.events.append(f"run {index}"))

    def _logged(self, fetch):
        def logged(swap: BlockSwap, number: int) -> None:
            before = list(swap._holds)
            fetch(swap, number)
            if swap._holds != before:
                self.events.append(f"fetch {number}")

        return logged

    def take(self) -> list[str]:
        taken, self.events = self.events, []
        return taken


def test_each_fetch_is_begun_as_soon_as_its_place_is_free(monkeypatch) -> None:
    log = Log(monkeypatch, LAYERS)
    assert log.take() == ["fetch 0", "fetch 1"]
    for _ in range(2):
        output = forward(log.calls, streams())
        assert log.take() == ["run 0", "fetch 2", "run 1", "fetch 3", "run 2", "fetch 4", "run 3", "run 4"]
        output.square().mean().backward()
        # Block 4 is gone when block 3's backward begins, and its place takes block 2.
        assert log.take() == ["run 4", "fetch 2", "run 3", "fetch 1", "run 2", "fetch 0", "run 1", "run 0"]


def test_sampling_goes_round(monkeypatch) -> None:
    log = Log(monkeypatch, 3)
    log.take()
    with torch.no_grad():
        for _ in range(2):
            forward(log.calls, streams())
            # Blocks 0, 2 and 4 are swapped, 0 and 4 share a place.
            assert log.take() == ["run 0", "fetch 2", "run 1", "run 2", "run 3", "run 4", "fetch 0"]


def test_a_step_cache_reads_the_first_block_although_it_is_swapped(monkeypatch) -> None:
    """It asks for its weights before every step, also where the step before spared all blocks."""
    monkeypatch.setattr(room, "CopyLane", LateLane)
    found = []
    for swapped in (0, LAYERS):
        plan = Plan(CPU.type, "fp32", "auto", "none", block_swap=swapped)
        model, cache = VelocityModel(transformer(LAYERS, attached=False), plan), StepCache(0.2, 7)
        with torch.no_grad():
            for call in range(7):
                level = torch.tensor([1 - 0.03 * call**2 / 7])
                velocity = model(normal(1, *SHAPE), level, captions(5), (cache,))
        found.append((cache.reused, velocity))
    (reused, expected_velocity), (reused_swapped, velocity) = found
    assert 0 < reused < 6, "some are spared and some are not, or the test shows nothing"
    assert reused_swapped == reused
    assert torch.equal(velocity, expected_velocity)


def test_two_blocks_of_weights_are_on_the_device() -> None:
    """Places are shared by name, so that the last block needs none of its own but for its other modulation."""

    def base(blocks: nn.Module) -> dict[str, torch.Tensor]:
        return {name: parameter for name, parameter in blocks.named_parameters() if ".lora_" not in name}

    made = transformer(LAYERS)
    first, last = made.transformer_blocks[0], made.transformer_blocks[-1]
    one = sum(parameter.nbytes for parameter in base(first).values())
    besides = base(last.norm1_context).values()
    wrapped(made, block_swap=LAYERS)
    there = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in base(made.transformer_blocks).values()}
    assert sum(there.values()) == 2 * one + sum(parameter.nbytes for parameter in besides)


def test_trained_weights_and_other_dtypes_are_refused() -> None:
    made = transformer(2)
    made.requires_grad_()
    with pytest.raises(AssertionError, match="is trained"):
        wrapped(made, block_swap=2)
    made = transformer(2)
    wrapped(made, block_swap=2)
    with pytest.raises(AssertionError, match="keep their dtypes"):
        made.to(torch.float64)


def test_a_model_that_leaves_the_device_is_whole_on_the_host_and_comes_back() -> None:
    """Its swapped weights are not copied: they are the host's own while it rests."""
    made, plain = transformer(LAYERS), transformer(LAYERS)
    swap = BlockSwap(made.transformer_blocks, 3, CPU)
    calls = [swap.wrap(index, partial(run_block, block, "full")) for index, block in enumerate(made.transformer_blocks)]
    reference = expected(layers=LAYERS)
    for _ in range(2):
        assert_same(step(made, calls), reference)
        swap._device = torch.device("cuda")  # as if it were there, so that the CPU is somewhere else
        made.to("cpu")
        hosts = {weight.host.data_ptr() for weights in swap._weights for weight in weights}
        assert hosts <= {parameter.data_ptr() for parameter in made.parameters()}
        for name, parameter in plain.named_parameters():
            assert torch.equal(made.get_parameter(name), parameter), name
        assert_same(step(made, calls), reference)
        assert swap._places == ({}, {})
        swap._device = CPU
        made.to("cpu")
        assert not hosts & {parameter.data_ptr() for parameter in made.parameters()}


def test_a_move_to_where_it_is_changes_nothing() -> None:
    made = transformer(LAYERS)
    calls = wrapped(made, "full", block_swap=3)
    step(made, calls)
    made.to("cpu")
    assert_same(step(made, calls), expected(layers=LAYERS))


@pytest.mark.parametrize(
    ("depth", "count", "swapped"),
    [(48, 0, ()), (48, 1, (24,)), (48, 4, (6, 18, 30, 42)), (5, 5, (0, 1, 2, 3, 4)), (48, 32, None)],
)
def test_swapped_blocks_are_spread_evenly(depth: int, count: int, swapped: tuple[int, ...] | None) -> None:
    found = swapped_blocks(depth, count)
    assert swapped is None or found == swapped
    assert len(set(found)) == count
    gaps = {after - before for before, after in pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_what_is_swapped_is_loaded_to_the_host() -> None:
    plan = Plan("cuda", "bf16", "auto", "full", block_swap=2)
    assert swapped_blocks(4, 2) == (1, 3)
    assert home_of("transformer_blocks.1.attn1.to_q.weight", 4, plan) == torch.device("cpu")
    assert home_of("transformer_blocks.2.attn1.to_q.weight", 4, plan) == torch.device("cuda")
    assert home_of("time_embed.caption_proj.weight", 4, plan) == torch.device("cuda")
    every = Plan("cuda", "bf16", "auto", "full", block_swap=4)
    assert home_of("transformer_blocks.0.attn1.to_q.weight", 4, every) == torch.device("cpu")
    assert home_of("transformer_blocks.0.norm1.linear.weight", 4, every) == torch.device("cpu")


def test_more_swapped_blocks_than_there_are_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="4 swapped blocks of 3"):
        wrap_blocks(transformer(3).transformer_blocks, Plan(CPU.type, "fp32", "auto", "full", block_swap=4))

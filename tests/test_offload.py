"""What blocks keep, in host memory: gradients, what is on the device when, and that nothing stays taken."""

import gc
import weakref

import pytest
import torch
from engine_blocks import CPU, LateLane, assert_same, expected, forward, step, streams, transformer
from inputs import normal

from mochi_lora.engine import offload as room
from mochi_lora.engine.blocks import _offloaded
from mochi_lora.engine.checkpoints import run_block
from mochi_lora.engine.offload import ActivationOffload
from mochi_lora.engine.transfer import CopyLane, HostMemory
from mochi_lora.errors import UserError

LEAST = 4000  # bytes; the visual stream of 40 tokens has 30720, the text stream 1920
GIVEN = streams(40)


@pytest.fixture(autouse=True)
def _small_tensors_count(monkeypatch) -> None:
    monkeypatch.setattr(room, "LEAST_BYTES", LEAST)


def offloaded(made) -> tuple[ActivationOffload, list]:
    offload = ActivationOffload(CPU)
    return offload, [_offloaded(run_block, block, offload) for block in made.transformer_blocks]


def test_gradients_are_right_however_late_the_copies_come(monkeypatch) -> None:
    monkeypatch.setattr(room, "CopyLane", LateLane)
    made = transformer(4, dropout=0.5)
    offload, calls = offloaded(made)
    for _ in range(3):
        assert_same(step(made, calls, GIVEN), expected(GIVEN, layers=4, dropout=0.5))
    assert offload.memory.bytes > 0


class Watched(CopyLane):
    """Remembers what was copied, by weak references to the sources."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.sources: list[weakref.ref[torch.Tensor]] = []
        self.calls: list[int] = []

    def copy(self, pairs):
        self.sources += [weakref.ref(source) for _, source in pairs]
        return super().copy(pairs)


def test_two_tensors_a_block_leave_and_only_the_last_block_has_them_on_the_device(monkeypatch) -> None:
    monkeypatch.setattr(room, "CopyLane", Watched)
    made = transformer(4)
    offload, calls = offloaded(made)
    visual, text, *rest = streams(40)
    for number, call in enumerate(calls, start=1):
        visual, text = call(visual, text, *rest)
        gc.collect()
        assert len(offload.out.sources) == 2 * number  # the block's visual input, the attention's output
        there = [source() is not None for source in offload.out.sources]
        assert there == [False] * (2 * number - 2) + [True, True]
    weights = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}
    assert not weights & {source().untyped_storage().data_ptr() for source in offload.out.sources if source() is not None}


def test_the_backward_fetches_one_block_ahead_and_the_last_block_nothing(monkeypatch) -> None:
    monkeypatch.setattr(room, "CopyLane", Watched)
    made = transformer(4)
    offload, calls = offloaded(made)
    fetched = []
    for block in made.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: fetched.append(len(offload.back.sources)))
    output = forward(calls, GIVEN)
    assert fetched == [0] * 4
    output.square().mean().backward()
    assert fetched[4:] == [2, 4, 6, 6]  # when the second forward pass of blocks 4, 3, 2, 1 begins


def test_steps_use_the_same_host_memory() -> None:
    made = transformer(3)
    offload, calls = offloaded(made)
    places, like = [], offload.memory.like
    offload.memory.like = lambda tensor: places.append((found := like(tensor)).data_ptr()) or found
    for _ in range(3):
        step(made, calls, GIVEN)
    assert len(places) == 18
    assert places[:6] == places[6:12] == places[12:]
    assert len(set(places)) == 6
    assert offload._kept == 0


def test_nothing_stays_taken_without_a_backward() -> None:
    made = transformer(3)
    offload, calls = offloaded(made)
    forward(calls, GIVEN)
    gc.collect()
    assert offload._kept == 0
    assert_same(step(made, calls, GIVEN), expected(GIVEN))


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_step_after_an_exception_is_right(place: str) -> None:
    """After one in the backward torch itself may hold the graph, and with it a place in host memory, for good."""
    made = transformer(3)
    offload, calls = offloaded(made)
    attention = made.transformer_blocks[1].attn1
    where = attention.to_out[0].base_layer.register_forward_hook
    if place == "backward":
        where = attention.to_q.lora_B.default.weight.register_hook

    def fail(*_: object) -> None:
        message = "on purpose"
        raise RuntimeError(message)

    hook = where(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        forward(calls, GIVEN).sum().backward()
    hook.remove()
    gc.collect()
    assert place == "backward" or offload._kept == 0
    made.zero_grad()
    assert_same(step(made, calls, GIVEN), expected(GIVEN))


def test_a_graph_that_is_kept_can_be_used_again() -> None:
    made = transformer(3)
    _, calls = offloaded(made)
    found = []
    for run in (calls, [lambda *a, b=block: run_block(b, "none", *a) for block in made.transformer_blocks]):
        loss = forward(run, GIVEN).square().mean()
        parameters = [parameter for parameter in made.parameters() if parameter.requires_grad]
        found.append([torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for _ in range(2)])
    for ours, plain in zip(*found, strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_sampling_copies_nothing(monkeypatch) -> None:
    monkeypatch.setattr(room, "CopyLane", Watched)
    offload, calls = offloaded(transformer(2))
    with torch.no_grad():
        forward(calls, GIVEN)
    assert offload.out.sources == []


def test_host_memory_keeps_shapes_strides_and_distance() -> None:
    memory = HostMemory(pinned=False)
    tensors = [normal(3, 5), normal(7, 2, 4).transpose(0, 2), torch.arange(3, dtype=torch.uint8), normal(4).bfloat16()]
    for _ in range(2):
        rooms = [memory.like(tensor) for tensor in tensors]
        for place, tensor in zip(rooms, tensors, strict=True):
            place.copy_(tensor)
        for place, tensor in zip(rooms, tensors, strict=True):
            assert torch.equal(place, tensor)
            assert (place.stride(), place.dtype) == (tensor.stride(), tensor.dtype)
        before = memory.bytes
        memory.reset()
    assert memory.bytes == before


def test_host_memory_wastes_little(monkeypatch) -> None:
    monkeypatch.setattr("mochi_lora.engine.transfer._ARENA", 2**16)
    memory = HostMemory(pinned=False)
    tensor = torch.empty(2**14 + 300, dtype=torch.uint8)  # torch would lock 2**15 for each
    for _ in range(60):
        memory.like(tensor)
    assert memory.bytes < 1.2 * 60 * tensor.nbytes
    assert all(arena.numel().bit_count() == 1 for arena in memory._arenas)


def test_host_memory_that_cannot_be_page_locked_is_named_with_a_way_out(monkeypatch) -> None:
    def refuse(*_sizes, **_options):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr("mochi_lora.engine.transfer.torch.empty", refuse)
    with pytest.raises(
        UserError, match=r"0\.5 GiB of host memory could not be page-locked \(CUDA error: out of memory\); lower"
    ):
        HostMemory(pinned=True).like(torch.zeros(4))

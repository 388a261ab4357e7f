"""On a CUDA device: checkpointing, offloading, swapping and compilation of blocks, against the plain ones.

Run with `pytest -m gpu`. The blocks are tiny; what a plan is worth is measured by `benchmarks/train_step.py`.
"""

import pytest
import torch
from engine_blocks import Step, forward, step, streams, transformer
from inputs import relative

from mochi_lora.engine import offload as offload_room
from mochi_lora.engine.blocks import wrap_blocks
from mochi_lora.engine.joint_block import install_blocks
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.transfer import CopyLane, HostMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
LAYERS = 6
PLANS = ("none", "mlp_recomputed", "attention_saved", "full", "offload", "offload:3,attention_saved:1,none")


def on_device(visual: int = 512, text: int = 24) -> tuple:
    *tensors, lengths, rotary = streams(visual, (text,))
    return *(tensor.to(CUDA) for tensor in tensors), lengths, tuple(table.to(CUDA) for table in rotary)


@pytest.fixture(autouse=True)
def _small_tensors_count(monkeypatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(offload_room, "LEAST_BYTES", 2**16)


def model(**settings: object):
    made = transformer(LAYERS).to(CUDA)
    install_blocks(made.transformer_blocks)
    return made, wrap_blocks(made.transformer_blocks, Plan("cuda", "fp32", "flash", **settings)).calls


def off(found: Step, exact: Step) -> tuple[float, float]:
    """Relative errors of the output and of all gradients together: small ones alone are mostly rounding."""
    names = list(exact[1])
    return relative(found[0], exact[0]), relative(
        *(torch.cat([one[1][name].flatten() for name in names]) for one in (found, exact))
    )


@pytest.mark.parametrize("swap", [0, 2, LAYERS])
@pytest.mark.parametrize("checkpointing", PLANS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_plan_gives_the_plain_gradients(checkpointing: str, swap: int, precision: torch.dtype) -> None:
    """Several steps without waiting, so that copies of one step meet the computation of the next."""
    given = on_device()
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        made, calls = model(checkpointing="none")
        output, gradients = step(made, calls, given)
        made, calls = model(checkpointing=checkpointing, block_swap=swap)
        found = [step(made, calls, given) for _ in range(5)]
    bound = 1e-5 if precision == torch.float32 else 2e-2
    for other, others in found:
        assert relative(other, output) < bound
        assert max(relative(others[name], gradients[name]) for name in gradients) < bound


@pytest.mark.parametrize(
    ("checkpointing", "swap"),
    [("none", 0), ("attention_saved", LAYERS), ("offload", 2), ("attention_saved:3,mlp_recomputed", 0)],
)
def test_compiled_plans_compile_little_and_compute_the_same(checkpointing: str, swap: int) -> None:
    """In bf16 the two round differently; neither may be further from float32 than the other by much."""
    torch._dynamo.utils.counters.clear()
    made, calls = model(checkpointing="none")
    exact = {text: step(made, calls, on_device(text=text)) for text in (24, 40, 1)}
    with torch.autocast("cuda", torch.bfloat16):
        plain = {text: step(made, calls, on_device(text=text)) for text in (24, 40, 1)}
        made, calls = model(checkpointing=checkpointing, block_swap=swap, compile=True)
        for text in (24, 40, 1, 24):
            found = step(made, calls, on_device(text=text))
            for mine, usual in zip(off(found, exact[text]), off(plain[text], exact[text]), strict=True):
                assert mine < 1.25 * usual < 0.1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (3 if "," in checkpointing else 2)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("checkpointing", ["attention_saved", "offload"])
def test_a_step_never_waits_and_allocates_nothing_new(checkpointing: str, compile: bool) -> None:  # noqa: A002, FBT001
    given = on_device()
    with torch.autocast("cuda", torch.bfloat16):
        made, calls = model(checkpointing=checkpointing, block_swap=3, compile=compile)
        for _ in range(3):
            step(made, calls, given)
        torch.cuda.synchronize()
        pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
        reserved = torch.cuda.memory_reserved()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                step(made, calls, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.cuda.memory_reserved() == reserved
        assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned


def test_a_swapped_model_leaves_the_device_and_comes_back() -> None:
    given = on_device()
    made, calls = model(checkpointing="full", block_swap=LAYERS)
    with torch.no_grad():
        before = forward(calls, given)
        full = torch.cuda.memory_allocated()
        made.cpu()
        assert torch.cuda.memory_allocated() < full
        weights = [p for name, p in made.transformer_blocks.named_parameters() if ".lora_" not in name]
        assert all(weight.device.type == "cpu" for weight in weights)
        made.to(CUDA)
        assert torch.equal(forward(calls, given), before)


def test_a_copy_runs_beside_the_computation_and_arrives_when_waited_for() -> None:
    lane, memory = CopyLane(CUDA), HostMemory(pinned=True)
    source = torch.randn(2**22, device=CUDA)
    host = memory.like(source)
    assert host.is_pinned()
    out = lane.copy([(host, source)])
    out.wait()
    source.zero_()  # after the copy, on this stream
    back = torch.empty_strided(host.shape, host.stride(), device=CUDA)
    lane.copy([(back, host)]).wait()
    assert relative(back, torch.zeros_like(back) + host.to(CUDA)) == 0
    assert back.abs().sum() > 0

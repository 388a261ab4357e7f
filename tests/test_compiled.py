"""Compiled blocks: no graph break, a few compilations whatever comes, and the same results.

Most tests compile with the `eager` or `aot_eager` backend, which guards and partitions as inductor does but writes no kernels.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compiled_graphs import fresh_compiler, graphs  # noqa: F401 - a fixture of every test here
from engine_blocks import Step, adapt, assert_same, expected, forward, step, streams, transformer, wrapped
from inputs import relative
from torch._inductor import config as inductor
from torch.autograd.graph import saved_tensors_hooks

from mochi_lora.engine import compiled
from mochi_lora.engine import offload as offload_room
from mochi_lora.model.adapter import Adapter, current, put, strengths


def assert_near(found: Step, usual: Step) -> None:
    assert relative(found[0], usual[0]) < 1e-5
    assert found[1].keys() == usual[1].keys()
    # Of the null prompt's text stream the gradients are zero, or nearly.
    largest = max(gradient.norm() for gradient in usual[1].values())
    errors = {name: ((found[1][name] - gradient).norm() / largest).item() for name, gradient in usual[1].items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_captions_and_the_null_prompt_share_a_block_and_a_last_block() -> None:
    """With and without gradients, one sample or two of any lengths: two graphs each. Captions of at most one token are padded
    to two, so that products of another size round differently."""
    made = transformer(3)
    calls = wrapped(made, "attention_saved", compile=True)
    for lengths in ((5,), (7,), (1,), (0,), (2,), (12,)):
        given = streams(lengths=lengths)
        assert_near(step(made, calls, given), expected(given))
    assert graphs() == 2
    with torch.no_grad():
        for lengths in ((5,), (9,), (0,)):
            forward(calls, streams(lengths=lengths))
    assert graphs() == 4
    for lengths in ((5, 3), (0, 4), (6, 6), (0, 0)):
        given = streams(lengths=lengths)
        assert_near(step(made, calls, given), expected(given))
    assert graphs() == 6


@pytest.mark.slow
def test_sizes_of_video_have_graphs_of_their_own_up_to_a_number(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "STATIC_SIZES", 2)
    made = transformer(2)
    calls = wrapped(made, compile=True)
    found = []
    with torch.no_grad():
        for visual in (12, 16, 20, 24, 12, 28, 16):
            given = streams(visual)
            assert torch.equal(forward(calls, given), forward(list(made.transformer_blocks), given))
            found.append(graphs())
    assert found == [2, 4, 6, 6, 6, 6, 6]


@pytest.mark.slow
def test_adapters_can_be_switched_and_weighed_without_stale_results() -> None:
    """A second strength is compiled once more, as a variable; those after it are not."""
    made = transformer(2, attached=False)
    adapt(made)
    second = current(made)
    tensors = {name: 0.5 * tensor.flip(0) for name, tensor in second.tensors.items()}
    put(made, Adapter(tensors, second.config, "the second"), "second")
    calls = wrapped(made, compile=True)
    seen = {}
    names = ["default", "second"]
    one, both = ((1.0, 0.0), (0.5, 0.0), (0.25, 0.0), (0.0, 0.0)), ((0.7, 0.2), (0.1, 0.9), (0.3, 0.6))
    for weights in (*one, *both, (0.8, 0.0), (0.0, 0.0)):
        with strengths(made, names, weights), torch.no_grad():
            seen[weights] = forward(calls, streams())
            assert torch.equal(seen[weights], forward(list(made.transformer_blocks), streams())), weights
            if weights == (0.25, 0.0):
                assert graphs() == 4
            if weights == (0.1, 0.9):
                compiled_so_far = graphs()
    assert graphs() == compiled_so_far
    outputs = list(seen.values())
    assert all(relative(one, other) > 1e-3 for number, one in enumerate(outputs) for other in outputs[:number])


def test_more_variants_than_the_limit_are_an_error_and_never_eager(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "_MOST_VARIANTS", 1)
    made = transformer(2)
    calls = wrapped(made, compile=True)
    with torch.no_grad(), pytest.raises(Exception, match="fullgraph=True"):
        forward(calls, streams())


def in_a_fresh_thread(work: Callable[[], object]) -> None:
    """As the demo works; what torch's compiler is told holds for the thread that told it."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_every_thread_compiles_with_the_same_settings_and_keeps_its_own(monkeypatch) -> None:
    seen, around = [], []

    def settings() -> tuple[int, int, bool]:
        limits = torch._dynamo.config
        return limits.recompile_limit, limits.accumulated_recompile_limit, inductor.shape_padding

    def backend(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        seen.append(settings())
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    calls = wrapped(transformer(2), compile=True)

    def work() -> None:
        around.append(settings())
        with torch.no_grad():
            forward(calls, streams())
        around.append(settings())

    in_a_fresh_thread(work)
    assert seen == [(256, 1024, False)] * 2
    assert around == [around[0]] * 2 != seen


@pytest.mark.slow
def test_a_fresh_thread_may_go_beyond_the_eight_variants_that_torch_allows() -> None:
    made = transformer(2)
    calls = wrapped(made, compile=True)

    def work() -> None:
        with torch.no_grad():
            for visual in (12, 16, 20, 24, 28):
                given = streams(visual)
                assert torch.equal(forward(calls, given), forward(list(made.transformer_blocks), given))

    in_a_fresh_thread(work)
    assert graphs() == 10


def test_a_model_that_is_not_trained_gets_no_graph_through_its_inputs() -> None:
    made = transformer(2, attached=False)
    assert not forward(wrapped(made, compile=True), streams()).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"block_swap": 3}], ids=["resident", "swapped"])
@pytest.mark.parametrize("checkpointing", ["full:2,mlp_recomputed", "attention_saved", "offload:2,none"])
def test_modes_and_swapping_change_no_gradient_when_compiled(monkeypatch, checkpointing: str, settings: dict) -> None:
    """Dropout included. The swapped weights are parameters whose content changes between the compiled calls."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(offload_room, "LEAST_BYTES", 4000)
    given = streams(40)
    made = transformer(3, dropout=0.5)
    calls = wrapped(made, checkpointing, compile=True, **settings)
    reference = expected(given, dropout=0.5)
    for _ in range(2):
        assert_same(step(made, calls, given), reference)
    assert graphs() == 2


@pytest.mark.slow
def test_inductor_computes_the_same_and_the_same_again(monkeypatch) -> None:
    """Dropout included: its draws are inductor's own, so that only what it drops may differ from eager mode."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    made = transformer(1)
    calls = wrapped(made, "attention_saved", compile=True)
    plain = expected(layers=1)
    assert_near(step(made, calls), plain)
    assert graphs() == 1
    made = transformer(1, dropout=0.5)
    calls = wrapped(made, "attention_saved", compile=True)
    first = step(made, calls)
    assert relative(first[0], plain[0]) > 1e-2
    assert_same(step(made, calls), first)


@pytest.mark.slow
def test_a_compiled_block_keeps_what_its_mode_says(monkeypatch) -> None:
    """The partitioner obeys the policy: per visual token, how wide what a block saves is; weights and text aside."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    made = transformer(2)
    block, given = made.transformer_blocks[0], streams(40)
    run, found = compiled.CompiledBlocks(), {}
    for mode in ("full", "attention_saved", "mlp_recomputed"):
        saved = []
        with saved_tensors_hooks(lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda tensor: tensor):
            run(block, mode, *given)
        weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        weights |= {table.untyped_storage().data_ptr() for table in given[4]}
        kept = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in weights and tensor.numel() >= 40 * 96]
        found[mode] = sorted(tensor.numel() // 40 for tensor in kept)
    joint = 45 * 192 // 40
    assert found["full"] == [192]  # the visual input
    assert found["attention_saved"] == [192, joint]
    assert found["mlp_recomputed"] == [192] * 6 + [joint]  # q, k, v, out and the feed-forward's output besides

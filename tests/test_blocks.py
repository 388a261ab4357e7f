"""Checkpointing by blocks: no mode changes a gradient, and each keeps what it says."""

from collections import Counter

import pytest
import torch
from engine_blocks import CPU, adapt, assert_same, expected, forward, step, streams, transformer, wrapped
from inputs import captions, normal, relative
from torch.utils._python_dispatch import TorchDispatchMode

from mochi_lora.engine.checkpoints import is_kept, modes_of
from mochi_lora.engine.kernels import ATTENTION_OPS
from mochi_lora.engine.plan import Plan
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import load_transformer

aten = torch.ops.aten
MODES = ("none", "mlp_recomputed", "attention_saved", "full", "offload")
MIXED = "offload:1,attention_saved:1,none"


class Counted(TorchDispatchMode):
    """Counts attentions and the products into the feed-forward's wide layer (512 gated twice) of the visual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen["attention"] += func in ATTENTION_OPS
        if func is aten.mm.default:
            self.seen["wide"] += args[1].shape == (192, 1024)
            self.seen["narrow"] += args[1].shape == (192, 192)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("checkpointing", [*MODES, MIXED])
def test_no_mode_changes_a_gradient(checkpointing: str, dropout: float) -> None:
    made = transformer(dropout=dropout)
    calls = wrapped(made, checkpointing)
    for _ in range(2):
        assert_same(step(made, calls), expected(dropout=dropout))


@pytest.mark.parametrize("checkpointing", MODES)
def test_captions_of_mixed_lengths_get_the_same_gradients_in_every_mode(checkpointing: str) -> None:
    given = streams(lengths=(5, 0, 3))
    made = transformer()
    assert_same(step(made, wrapped(made, checkpointing), given), expected(given))


@pytest.mark.parametrize(
    ("checkpointing", "again"),
    [
        ("none", ()),
        ("mlp_recomputed", ("wide",)),
        ("attention_saved", ("wide", "narrow")),
        ("offload", ("wide", "narrow")),
        ("full", ("attention", "wide", "narrow")),
    ],
)
def test_a_mode_computes_again_what_it_does_not_keep(checkpointing: str, again: tuple[str, ...]) -> None:
    """The backward of a product x W.T, W frozen, is one product with W: the counts are of W.T, so of forward passes."""
    made = transformer(2)
    given = streams(visual=40)
    with Counted() as counted:
        output = forward(wrapped(made, checkpointing), given)
    first = dict(counted.seen)
    assert set(first) == {"attention", "wide", "narrow"}
    assert all(first.values())
    with Counted() as counted:
        output.square().mean().backward()
    plain = transformer(2)
    reference = forward(list(plain.transformer_blocks), given)
    with Counted() as usual:
        reference.square().mean().backward()
    assert {name for name in first if counted.seen[name] > usual.seen[name]} == set(again)


def test_sampling_keeps_nothing_in_any_mode() -> None:
    made = transformer()
    with torch.no_grad():
        outputs = [forward(wrapped(made, checkpointing), streams()) for checkpointing in (*MODES, MIXED)]
    assert not any(output.requires_grad for output in outputs)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_modes_go_to_blocks_in_order() -> None:
    assert modes_of("full", 3) == ("full",) * 3
    assert modes_of("offload:2,none", 5) == ("offload", "offload", "none", "none", "none")
    assert modes_of("full:3", 3) == ("full",) * 3


@pytest.mark.parametrize("checkpointing", ["full:4,none", "full:2", "none:1,full:1"])
def test_more_or_fewer_modes_than_blocks_are_an_error_of_ours(checkpointing: str) -> None:
    with pytest.raises(AssertionError, match="the model has 3"):
        modes_of(checkpointing, 3)


@pytest.mark.parametrize(
    ("kept", "rows", "contracted", "columns"),
    [
        pytest.param("kept", 11130, 3072, 16, id="LoRA, down"),
        pytest.param("not kept", 11130, 16, 3072, id="LoRA, up"),
        pytest.param("kept", 2, 3072, 12288, id="modulation"),
        pytest.param("not kept", 11130, 3072, 3072, id="projection"),
        pytest.param("not kept", 11130, 3072, 16384, id="feed-forward, in"),
    ],
)
def test_a_product_much_smaller_than_what_it_reads_is_kept(kept: str, rows: int, contracted: int, columns: int) -> None:
    first, second = torch.empty(rows, contracted, device="meta"), torch.empty(contracted, columns, device="meta")
    assert is_kept(aten.mm.default, (first, second)) is (kept == "kept")
    assert is_kept(aten.addmm.default, (torch.empty(columns, device="meta"), first, second)) is (kept == "kept")
    held = torch.empty(columns, contracted, device="meta")
    assert is_kept(torch.ops.mochi_lora.byte_product.default, (first, held, held[:, 0])) is (kept == "kept")
    codes = (first, second, [], [columns, contracted], "int8")
    assert is_kept(torch.ops.mochi_lora.weight_only_product.default, codes) is (kept == "kept")


@pytest.mark.parametrize("settings", [{}, {"block_swap": 1}, {"block_swap": 2}])
@pytest.mark.parametrize("checkpointing", [*MODES, "offload:1,none"])
def test_the_velocity_is_that_of_the_plain_model_under_every_plan(tiny, checkpointing: str, settings: dict) -> None:
    found = []
    for plan in (Plan("cpu", "fp32", "auto", "none"), Plan("cpu", "fp32", "auto", checkpointing, **settings)):
        loaded = load_transformer(tiny / "transformer", device=CPU, precision="fp32").transformer
        model = VelocityModel(loaded, plan)
        adapt(loaded)
        velocity = model(normal(2, 12, 2, 8, 12), torch.tensor([0.3, 0.8]), captions(5, 3))
        velocity.square().mean().backward()
        found.append((velocity.detach(), {name: p.grad for name, p in loaded.named_parameters() if p.grad is not None}))
    assert_same(*found)


def test_rotary_tables_follow_the_size_the_frequencies_and_the_device(tiny) -> None:
    """They are kept between steps; what they are made from must be seen to change."""
    sigma, text = torch.tensor([0.5]), captions(4)
    shapes = [(1, 12, 2, 8, 12), (1, 12, 3, 8, 12), (1, 12, 2, 12, 8), (1, 12, 2, 8, 12)]

    def fresh() -> VelocityModel:
        loaded = load_transformer(tiny / "transformer", device=CPU, precision="fp32").transformer
        return VelocityModel(loaded, Plan("cpu", "fp32", "auto", "none"))

    used = fresh()
    with torch.no_grad():
        for shape in shapes:
            assert torch.equal(used(normal(*shape), sigma, text), fresh()(normal(*shape), sigma, text))
        before = used(normal(*shapes[0]), sigma, text)
        used.transformer.pos_frequencies.mul_(1.5)
        after = used(normal(*shapes[0]), sigma, text)
        assert relative(after, before) > 1e-3
        used.double().float()
        assert torch.equal(used(normal(*shapes[0]), sigma, text), after)

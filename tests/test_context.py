"""Context ranks: each has a part of the tokens, and output and summed gradients are those of one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_blocks import adapt
from gang import Ranks, together
from inputs import SHAPE, caption, captions, normal

from mochi_lora.config.schema import SampleConfig
from mochi_lora.engine import compiled as compiled_blocks
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.shards import ShardedBlocks
from mochi_lora.inference.generate import generate_latents
from mochi_lora.model.flow import velocity_loss
from mochi_lora.model.step_cache import StepCache
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import random_transformer
from mochi_lora.parallel.mesh import ALONE, reduce_gradients

LENGTHS = (5, 0)
PLAIN = Plan("cpu", "fp32", "auto", "none")
MODES = ("none", "mlp_recomputed", "attention_saved", "full", "offload", "attention_saved:2,none")


def model_of(ranks: Ranks, plan: Plan, *, dropout: float = 0.0, layers: int = 3) -> VelocityModel:
    transformer = random_transformer(TRANSFORMER | {"num_layers": layers}, device=torch.device("cpu"), precision=plan.precision)
    adapt(transformer, dropout=dropout)
    placed = replace(plan, context=ranks.layout.context, shard=ranks.layout.shard)
    return VelocityModel(transformer, placed, ranks).train()


def one_step(ranks: Ranks, plan: Plan, lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Velocity, and the adapter's gradients after the launch has agreed on them."""
    model = model_of(ranks, plan)
    samples = len(lengths)
    predicted = model(normal(samples, *SHAPE), torch.linspace(0.3, 0.8, samples), captions(*lengths))
    loss = velocity_loss(predicted, normal(samples, *SHAPE, seed=9)).mean()
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    told = reduce_gradients(list(trained.values()), loss.detach(), ranks.layout)
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
    return predicted.detach(), gradients | {"loss": told}


def every_step(ranks: Ranks, plans: tuple[Plan, ...]) -> list:
    return [one_step(ranks, plan) for plan in plans]


def off(found: np.ndarray, expected: torch.Tensor) -> float:
    """Largest error over the largest value."""
    return float(np.abs(found - expected.numpy()).max() / expected.abs().max())


def held(found: tuple, expected: tuple) -> None:
    assert off(found[0], expected[0]) < 1e-5
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert tensor.abs().max() > 0, f"{name} has no gradient: the test shows nothing"
        assert off(found[1][name], tensor) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_velocity_and_gradients_are_those_of_one_process_in_every_mode(world: int) -> None:
    plans = tuple(replace(PLAIN, checkpointing=mode) for mode in MODES)
    expected = one_step(ALONE, PLAIN)
    for rank in together(world, every_step, plans, parallel=f"context:{world}"):
        for found in rank:
            held(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "parallel"), [(2, "shard:2"), (3, "shard:3"), (4, "data:2,context:2,shard:4")])
def test_a_sharded_base_gives_the_gradients_of_a_whole_one(world: int, parallel: str) -> None:
    plans = tuple(replace(PLAIN, checkpointing=mode) for mode in ("none", "full", "attention_saved:2,none"))
    expected = one_step(ALONE, PLAIN)
    for rank in together(world, every_step, plans, parallel=parallel):
        for found in rank:
            held(found, expected)


def sharded_bytes(ranks: Ranks, precision: str) -> tuple[float, list]:
    """Share of the blocks' weights that this rank holds at rest, and what two steps in a row give: nothing is left behind."""
    plan = replace(PLAIN, precision=precision)
    model = model_of(ranks, plan)
    swap = model._blocks.swap
    assert isinstance(swap, ShardedBlocks)
    whole = sum(weight.host.numel() * weight.host.itemsize for weights in swap._weights for weight in weights)
    return sum(part.numel() for part in swap._parts) / whole, [one_step(ranks, plan) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4", "int8"])
def test_a_rank_holds_its_part_of_the_bytes_of_every_precision(precision: str) -> None:
    expected = one_step(ALONE, replace(PLAIN, precision=precision))
    for share, steps in together(2, sharded_bytes, precision, parallel="shard:2"):
        assert 0.5 <= share < 0.6
        for found in steps:
            assert np.array_equal(found[0], expected[0].numpy()), "the same weights, so the same bits"
            held(found, expected)


def dropped(ranks: Ranks, seed: int) -> torch.Tensor:
    """The text stream after a block with adapter dropout; `seed` alike on all ranks, or one's own where it is negative."""
    model, texts = model_of(ranks, PLAIN, dropout=0.5), []
    model.transformer.transformer_blocks[1].register_forward_hook(lambda _module, _given, after: texts.append(after[1]))
    torch.manual_seed(seed if seed >= 0 else ranks.rank)
    model(normal(1, *SHAPE), torch.tensor([0.5]), captions(5))
    return texts[0]


def spared(ranks: Ranks) -> tuple[int, torch.Tensor]:
    """Calls that reused work, of seven whose input changes little by little."""
    model, cache = model_of(ranks, PLAIN).eval(), StepCache(0.2, 7)
    with torch.no_grad():
        for call in range(7):
            level = torch.tensor([1 - 0.03 * call**2 / 7])
            velocity = model(normal(1, *SHAPE), level, captions(5), (cache,))
    return cache.reused, velocity


@pytest.mark.slow
def test_ranks_of_one_video_agree_on_dropout_of_its_text_and_on_the_steps_they_spare() -> None:
    for seed, same in ((3, True), (-1, False)):
        first, second = together(2, dropped, seed, parallel="context:2")
        assert np.array_equal(first, second) == same
    reused, expected = spared(ALONE)
    assert 0 < reused < 6, "some are spared and some are not, or the test shows nothing"
    for found, velocity in together(2, spared, parallel="context:2"):
        assert found == reused
        assert off(velocity, expected) < 1e-5


def guided(ranks: Ranks, passes: str, step_cache: float) -> torch.Tensor:
    """Latents of a video whose first and last step are not guided."""
    model = model_of(ranks, replace(PLAIN, guidance_passes=passes)).eval()
    settings = SampleConfig(frames=7, height=64, width=96, steps=6, guidance=[1, 4, 4, 4, 4, 1], step_cache=step_cache)
    return generate_latents(model, caption(5), caption(0), settings, 0, on_step=lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("step_cache", [0.0, 0.2])
def test_ranks_of_one_video_guide_in_one_batch_as_one_process_in_two_passes(step_cache: float) -> None:
    expected = guided(ALONE, "two", step_cache)
    for found in together(2, guided, "one", step_cache, parallel="context:2"):
        assert off(found, expected) < 1e-5


def compiled(ranks: Ranks) -> tuple:
    """A step through compiled blocks, traced whole by torch's own means: a kernel compiler would take half a minute."""
    compiled_blocks.BACKEND = "aot_eager"
    return one_step(ranks, replace(PLAIN, checkpointing="attention_saved", compile=True))


@pytest.mark.slow
def test_compiled_blocks_hold_the_exchange_without_a_break() -> None:
    expected = one_step(ALONE, PLAIN)
    for found in together(2, compiled, parallel="context:2,shard:2"):
        held(found, expected)

"""Latents from a prompt: a function of its arguments, with the condition it was given and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from inputs import SHAPE, caption, hash_of_base, normal, relative

from mochi_lora.config.schedule import linear_quadratic_schedule
from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.inference.generate import condition, generate_latents
from mochi_lora.inference.sampler import Cancelled, draw_noise
from mochi_lora.model.transformer import TextBatch, VelocityModel

Load = Callable[..., VelocityModel]
SETTINGS = SampleConfig(prompts=[], frames=7, height=32, width=48, steps=3, guidance=4.0)
NULL = TextEmbedding(torch.zeros(0, 64))


@pytest.fixture
def model(load_tiny: Load) -> VelocityModel:
    return load_tiny()


def generate(
    model: VelocityModel, *, prompt=None, negative=NULL, seed: int = 0, on_step=lambda *_: None, **changes
) -> torch.Tensor:
    settings = SETTINGS.model_copy(update=changes)
    return generate_latents(model, prompt or caption(5), negative, settings, seed, on_step=on_step)


def test_latents_are_the_euler_sum_of_guided_velocities(model: VelocityModel) -> None:
    """The whole recipe written out with the bare model: noise, schedule, order of the conditions, guidance."""
    sigmas = linear_quadratic_schedule(3)
    latents = draw_noise(0, (1, 12, 2, 4, 6))
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            level = torch.tensor([sigma], dtype=torch.float32)
            told = model(latents, level, TextBatch.collate([caption(5)]))
            null = model(latents, level, TextBatch(torch.zeros(1, 1, 64), (0,)))
            latents = latents + (sigma - following) * (null + 4.0 * (told - null))
    found = generate(model)
    assert (found.shape, found.dtype) == ((12, 2, 4, 6), torch.float32)
    assert relative(found, latents[0]) < 1e-5


def test_a_guidance_of_one_never_asks_the_null_prompt(model: VelocityModel) -> None:
    other = caption(3, seed=9)
    assert torch.equal(generate(model, guidance=1.0), generate(model, guidance=1.0, negative=other))
    assert relative(generate(model, negative=other), generate(model)) > 0.01
    assert relative(generate(model, guidance=1.0), generate(model)) > 0.01


def test_exchanged_conditions_give_another_video(model: VelocityModel) -> None:
    assert relative(generate(model, prompt=NULL, negative=caption(5)), generate(model)) > 0.01


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_video(model: VelocityModel, load_tiny: Load) -> None:
    torch.manual_seed(1)
    first = generate(model)
    torch.manual_seed(2)
    generate(model, seed=1)
    assert torch.equal(generate(load_tiny()), first)
    assert relative(generate(model, seed=1), first) > 0.1


def test_the_null_prompt_is_per_sample_beside_real_captions(model: VelocityModel) -> None:
    """Both orders of ["a caption", ""] in one batch give what each of them gives alone."""
    latents, sigma = normal(2, *SHAPE), torch.tensor([0.6, 0.6])
    with torch.no_grad():
        for texts in ([caption(5), NULL], [NULL, caption(5)]):
            together = model(latents, sigma, TextBatch.collate(texts))
            for row, text in enumerate(texts):
                alone = condition(model, text)(latents[row : row + 1], sigma[row : row + 1])
                assert relative(together[row], alone[0]) < 1e-5


def test_sampling_leaves_model_and_global_generators_as_they_were(model: VelocityModel) -> None:
    model.transformer.transformer_blocks[0].train()
    modes = {name: module.training for name, module in model.named_modules()}
    before, states = hash_of_base(model), (torch.get_rng_state(), np.random.get_state()[1].copy())
    generate(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert hash_of_base(model) == before
    assert torch.is_grad_enabled()


def test_latents_carry_no_graph(load_tiny: Load) -> None:
    model = load_tiny(checkpointing="full")
    model.transformer.proj_out.weight.requires_grad_()
    assert not generate(model).requires_grad


def test_steps_are_reported_and_a_cancelled_video_stops_at_once(model: VelocityModel) -> None:
    steps = []
    generate(model, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    steps.clear()
    with pytest.raises(Cancelled):
        generate_latents(
            model,
            caption(5),
            NULL,
            SETTINGS,
            0,
            on_step=lambda done, _total: steps.append(done),
            cancelled=lambda: len(steps) == 1,
        )
    assert steps == [1]


def test_the_settings_shape_latents_and_schedule(model: VelocityModel) -> None:
    assert generate(model, frames=1, height=16).shape == (12, 1, 2, 6)
    assert relative(generate(model, threshold_noise=0.2), generate(model)) > 1e-3
    assert relative(generate(model, linear_steps=2), generate(model)) > 1e-3
    assert torch.equal(generate(model, guidance=[4.0, 4.0, 4.0]), generate(model))


def evaluations(model: VelocityModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Text lengths for which the blocks ran, in order; filled as they do."""
    lengths, run = [], model._run_blocks

    def counted(*arguments: object) -> torch.Tensor:
        lengths.append(arguments[3][0])
        return run(*arguments)

    monkeypatch.setattr(model, "_run_blocks", counted)
    return lengths


def test_steps_outside_the_guided_interval_never_ask_the_null_prompt(model: VelocityModel, monkeypatch) -> None:
    ran = evaluations(model, monkeypatch)
    sigmas = linear_quadratic_schedule(3)
    generate(model, guidance_interval=(sigmas[1], sigmas[1]))
    assert ran == [5, 5, 0, 5]
    assert torch.equal(generate(model, guidance_interval=(sigmas[1], sigmas[1])), generate(model, guidance=[1.0, 4.0, 1.0]))


def test_a_step_cache_computes_the_first_and_the_last_call_of_each_condition(model: VelocityModel, monkeypatch) -> None:
    exact = generate(model, steps=6)
    ran = evaluations(model, monkeypatch)
    never_due = generate(model, steps=6, step_cache=1e6)
    assert ran == [5, 0, 5, 0]
    assert relative(never_due, exact) > 0
    ran.clear()
    assert torch.equal(generate(model, steps=6, step_cache=1e-9), exact), "always due: nothing is reused"
    assert ran == [5, 0] * 6
    ran.clear()
    generate(model, steps=6, step_cache=1e6, guidance=[1.0, 4.0, 4.0, 4.0, 1.0, 1.0])
    assert ran == [5, 0, 0, 5], "the null prompt's last call is its third"


def in_one_batch(model: VelocityModel) -> VelocityModel:
    model.plan = replace(model.plan, guidance_passes="one")
    return model


@pytest.mark.parametrize("negative", [NULL, caption(11, seed=9), caption(5, seed=9)], ids=["null", "longer", "as long"])
@pytest.mark.parametrize("changes", [{}, {"guidance": [4.0, 1.0, 0.5]}, {"steps": 6, "step_cache": 0.3}], ids=str)
def test_one_batch_of_both_prompts_is_two_passes(
    model: VelocityModel, load_tiny: Load, monkeypatch, negative: TextEmbedding, changes: dict
) -> None:
    ran = evaluations(model, monkeypatch)
    apart = generate(model, negative=negative, **changes)
    together = in_one_batch(load_tiny())
    rows, ran_together = 0, evaluations(together, monkeypatch)
    run = together._run_blocks

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal rows
        rows += len(arguments[3])
        return run(*arguments)

    monkeypatch.setattr(together, "_run_blocks", counted)
    assert relative(generate(together, negative=negative, **changes), apart) < 1e-5
    assert rows == len(ran), "each condition is computed as often"
    assert len(ran_together) < len(ran)


def test_prompts_in_one_batch_keep_caches_of_their_own(load_tiny: Load, monkeypatch) -> None:
    """The null prompt's last call is its third: computed alone while the prompt's is spared."""
    ran = evaluations(in_one_batch(model := load_tiny()), monkeypatch)
    generate(model, steps=6, step_cache=1e6, guidance=[1.0, 4.0, 4.0, 4.0, 1.0, 1.0])
    assert ran == [5, 0, 0, 5]
    ran.clear()
    generate(model, steps=6, step_cache=1e6)
    assert ran == [5, 5], "both rows of the first and of the last step, the prompt's first"


def test_a_guidance_of_one_stays_one_sample(load_tiny: Load, monkeypatch) -> None:
    model = in_one_batch(load_tiny())
    sizes, run = [], model._run_blocks
    monkeypatch.setattr(model, "_run_blocks", lambda *given: sizes.append(given[3]) or run(*given))
    generate(model, guidance=[1.0, 4.0, 1.0])
    assert sizes == [(5,), (5, 0), (5,)]

"""The sampler against velocities whose answer is known."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mochi_lora.config.schedule import guidance_schedule, linear_quadratic_schedule
from mochi_lora.inference.sampler import Cancelled, draw_noise, sample_latents

SHAPE = (2, 12, 3, 4, 6)


def constant(value: torch.Tensor):
    return lambda _latents, _sigma: value


def never_called(_latents: torch.Tensor, _sigma: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the null prompt was asked for")


def run(conditional, unconditional, noise, *, steps=8, guidance=1.0, **callbacks) -> torch.Tensor:
    sigmas = linear_quadratic_schedule(steps)
    return sample_latents(conditional, unconditional, noise, sigmas, guidance_schedule(guidance, steps), **callbacks)


@pytest.mark.parametrize("steps", [8, 64])
def test_the_true_velocity_leads_to_the_data_along_the_straight_path(steps: int) -> None:
    data, noise = draw_noise(1, SHAPE), draw_noise(2, SHAPE)
    seen = []

    def oracle(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert (latents.dtype, sigma.dtype, sigma.shape) == (torch.float32, torch.float32, (2,))
        level = sigma.view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(latents, (1 - level) * data + level * noise, atol=1e-5, rtol=0)
        seen.append(sigma[0].item())
        return data - noise

    result = run(oracle, never_called, noise, steps=steps)
    torch.testing.assert_close(result, data, atol=1e-5, rtol=0)
    assert seen == pytest.approx(linear_quadratic_schedule(steps)[:-1])


def test_bf16_latents_would_miss_the_data() -> None:
    data, noise = draw_noise(1, SHAPE), draw_noise(2, SHAPE)
    latents = noise.bfloat16()
    for sigma, following in pairwise(linear_quadratic_schedule(64)):
        latents = (latents.float() + (sigma - following) * (data - noise)).bfloat16()
    lost = (latents.float() - data).square().mean().sqrt()
    ours = (run(constant(data - noise), never_called, noise, steps=64) - data).square().mean().sqrt()
    assert lost > 0.01
    assert lost > 1000 * ours


def test_guidance_moves_from_the_null_prompt_through_the_prompt() -> None:
    noise, conditional, null = draw_noise(0, SHAPE), draw_noise(1, SHAPE), draw_noise(2, SHAPE)
    result = run(constant(conditional), constant(null), noise, guidance=6.0)
    torch.testing.assert_close(result, noise + null + 6 * (conditional - null), atol=1e-4, rtol=0)
    swapped = run(constant(null), constant(conditional), noise, guidance=6.0)
    assert (swapped - result).abs().mean() > 1


def test_guidance_of_one_is_the_prompt_alone() -> None:
    noise, conditional = draw_noise(0, SHAPE), draw_noise(1, SHAPE)
    result = run(constant(conditional), never_called, noise, guidance=1.0)
    torch.testing.assert_close(result, noise + conditional, atol=1e-5, rtol=0)


def test_each_step_uses_its_own_guidance() -> None:
    noise, zero, one = draw_noise(0, (1, 12, 1, 2, 2)), torch.zeros(1, 12, 1, 2, 2), torch.ones(1, 12, 1, 2, 2)
    result = sample_latents(constant(one), constant(zero), noise, [1.0, 0.75, 0.0], [4.0, 2.0])
    torch.testing.assert_close(result - noise, torch.full_like(noise, 0.25 * 4 + 0.75 * 2))


def test_a_guidance_list_of_another_length_is_refused() -> None:
    noise = draw_noise(0, SHAPE)
    with pytest.raises(ValueError, match="shorter"):
        sample_latents(constant(noise), constant(noise), noise, [1.0, 0.5, 0.0], [6.0])


def test_guidance_of_a_bf16_model_is_computed_in_float32() -> None:
    noise = draw_noise(0, SHAPE)
    conditional, null = draw_noise(1, SHAPE).bfloat16(), draw_noise(2, SHAPE).bfloat16()
    result = run(constant(conditional), constant(null), noise, guidance=6.0)
    assert result.dtype == torch.float32
    expected = noise + null.float() + 6 * (conditional.float() - null.float())
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_bf16_noise_is_refused() -> None:
    noise = draw_noise(0, SHAPE)
    with pytest.raises(AssertionError, match="float32"):
        run(constant(noise), never_called, noise.bfloat16())


def test_every_step_is_reported_once() -> None:
    noise, steps = draw_noise(0, SHAPE), []
    run(constant(noise), never_called, noise, steps=4, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_cancelled_sampling_calls_the_model_no_more() -> None:
    noise, calls = draw_noise(0, SHAPE), []

    def model(_latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(sigma)
        return noise

    with pytest.raises(Cancelled):
        run(model, never_called, noise, cancelled=lambda: len(calls) == 3)
    assert len(calls) == 3


def test_sampling_leaves_the_noise_the_global_generators_and_autograd_alone() -> None:
    noise = draw_noise(0, SHAPE)
    kept, torch_state, numpy_state = noise.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    velocity = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    result = run(constant(velocity), never_called, draw_noise(0, SHAPE))
    run(constant(velocity), never_called, noise)
    assert torch.equal(noise, kept)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert not result.requires_grad


def test_noise_is_a_standard_normal_of_its_seed() -> None:
    noise = draw_noise(7, SHAPE)
    assert (noise.dtype, noise.device.type, tuple(noise.shape)) == (torch.float32, "cpu", SHAPE)
    assert torch.equal(noise, draw_noise(7, SHAPE))
    assert not torch.equal(noise, draw_noise(8, SHAPE))
    many = draw_noise(2**63 - 1, (200_000,))
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01


def test_seeds_keep_their_noise_across_versions() -> None:
    """A change here means that every published seed gives another video."""
    torch.testing.assert_close(draw_noise(0, (3,)), torch.tensor([0.059911035, 0.015559634, -1.164438486]), atol=1e-7, rtol=0)

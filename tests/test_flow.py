"""Flow matching by its own definitions, and against what the two public trainers do instead."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from inputs import normal, relative

from mochi_lora.model.flow import (
    LatentStats,
    draw_posterior,
    interpolate,
    temporal_loss,
    velocity_loss,
    velocity_target,
)

CHANNELS = 12
SHAPE = (3, CHANNELS, 4, 4, 6)
MEAN = tuple(0.3 * channel - 1.5 for channel in range(CHANNELS))
STD = tuple(0.6 + 0.1 * channel for channel in range(CHANNELS))
STATS = LatentStats(MEAN, STD)


def raw_latents() -> torch.Tensor:
    """Latents with the moments of `STATS`, as they leave the VAE."""
    column = (-1, 1, 1, 1)
    return normal(*SHAPE, seed=1) * torch.tensor(STD).view(column) + torch.tensor(MEAN).view(column)


def test_normalised_latents_have_zero_mean_and_unit_variance_in_every_channel() -> None:
    raw = normal(1, CHANNELS, 10, 40, 40) * torch.tensor(STD).view(-1, 1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1, 1)
    normalised = STATS.normalise(raw).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(CHANNELS), atol=0.04, rtol=0)
    torch.testing.assert_close(normalised.std(1), torch.ones(CHANNELS), atol=0.04, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.18215])
def test_denormalising_undoes_normalising(scale: float) -> None:
    stats, raw = LatentStats(MEAN, STD, scale), raw_latents()
    torch.testing.assert_close(stats.denormalise(stats.normalise(raw)), raw, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.normalise(raw[0]), stats.normalise(raw)[0])
    assert (stats.normalise(raw) - raw).abs().mean() > 0.5


def test_half_precision_latents_are_normalised_in_float32() -> None:
    stored = raw_latents().bfloat16()
    assert STATS.normalise(stored).dtype == torch.float32
    assert torch.equal(STATS.normalise(stored), STATS.normalise(stored.float()))


def test_another_mean_shifts_the_latents_and_nothing_else() -> None:
    """The affine belongs to the latents: the noise a target was made with comes back out of it exactly."""
    raw, noise = raw_latents(), normal(*SHAPE, seed=2)
    shifted = LatentStats(tuple(mean + 1 for mean in MEAN), STD)
    for stats in (STATS, shifted):
        clean = stats.normalise(raw)
        torch.testing.assert_close(velocity_target(clean, noise) + noise, clean, atol=1e-6, rtol=0)
    expected = 1 / torch.tensor(STD).view(-1, 1, 1, 1).expand(SHAPE)
    torch.testing.assert_close(STATS.normalise(raw) - shifted.normalise(raw), expected, atol=1e-5, rtol=0)


def test_genmos_fine_tuner_states_another_target() -> None:
    """genmoai/mochi @0c86aeb `demos/fine_tuner/train.py:356-372` applies the affine to clean - noise of raw latents."""
    raw, noise = raw_latents(), normal(*SHAPE, seed=2)
    ours = velocity_target(STATS.normalise(raw), noise)
    genmo = STATS.normalise(velocity_target(raw, noise))
    torch.testing.assert_close(genmo, STATS.normalise(raw) - noise / torch.tensor(STD).view(-1, 1, 1, 1), atol=1e-5, rtol=0)
    assert relative(genmo, ours) > 0.1


def test_the_target_leads_from_pure_noise_to_the_data_in_one_step() -> None:
    clean, noise = STATS.normalise(raw_latents()), normal(*SHAPE, seed=2)
    start = interpolate(clean, noise, torch.ones(3))
    torch.testing.assert_close(start + (1.0 - 0.0) * velocity_target(clean, noise), clean, atol=1e-6, rtol=0)


def test_sigma_zero_is_data_and_sigma_one_is_noise() -> None:
    clean, noise = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    mixed = interpolate(clean, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(mixed[0], clean[0])
    assert torch.equal(mixed[1], noise[1])
    torch.testing.assert_close(mixed[2], 0.75 * clean[2] + 0.25 * noise[2])


def test_the_velocity_is_minus_the_slope_of_the_path() -> None:
    clean, noise = normal(*SHAPE, seed=1).double(), normal(*SHAPE, seed=2).double()
    low, high = (interpolate(clean, noise, torch.full((3,), sigma, dtype=torch.float64)) for sigma in (0.4, 0.6))
    torch.testing.assert_close(-(high - low) / 0.2, velocity_target(clean, noise))


def test_an_extreme_posterior_is_not_clamped() -> None:
    """diffusers clamps logvar to [-30, 20], Genmo does not."""
    mean, unit = torch.zeros(1, CHANNELS, 1, 1, 1), torch.ones(1, CHANNELS, 1, 1, 1)
    for logvar in (25.0, -40.0):
        wide = torch.full_like(mean, logvar)
        torch.testing.assert_close(draw_posterior(mean, wide, unit), torch.exp(wide / 2))
        clamped = DiagonalGaussianDistribution(torch.cat([mean, wide], dim=1)).std
        assert (draw_posterior(mean, wide, unit) / clamped - 1).abs().min() > 0.9


def test_a_posterior_is_drawn_in_float32_with_its_own_mean_and_spread() -> None:
    mean, logvar, unit = torch.full((4,), 2.0), torch.full((4,), 0.5), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    drawn = draw_posterior(mean.bfloat16(), logvar.bfloat16(), unit)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, 2 + torch.exp(torch.tensor(0.25)) * unit)


def test_the_loss_is_each_samples_own_mean() -> None:
    target = normal(2, CHANNELS, 2, 4, 4)
    predicted = target.clone()
    predicted[1] += 3
    torch.testing.assert_close(velocity_loss(predicted, target), torch.tensor([0.0, 9.0]))
    long = velocity_loss(torch.ones(1, CHANNELS, 7, 4, 4), torch.zeros(1, CHANNELS, 7, 4, 4))
    short = velocity_loss(torch.ones(1, CHANNELS, 1, 4, 4), torch.zeros(1, CHANNELS, 1, 4, 4))
    assert torch.equal(long, short)


def test_the_loss_of_a_bf16_prediction_is_float32() -> None:
    target = normal(*SHAPE)
    predicted = normal(*SHAPE, seed=1).bfloat16()
    loss = velocity_loss(predicted, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (predicted.float() - target).square().flatten(1).mean(1))


def test_single_frames_have_no_temporal_loss() -> None:
    still = (5, CHANNELS, 1, 4, 6)
    loss = temporal_loss(normal(*still), normal(*still, seed=1), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(loss, torch.zeros(5))


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_temporal_loss_is_motiondirectors_formula(beta: float) -> None:
    """Equations 7 and 8 of arXiv 2310.08465, written out: debias prediction and target, frame by frame, then compare."""
    predicted, target, anchor = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2), torch.tensor([0, 2, 3])
    expected = []
    for sample, pivot in enumerate(anchor.tolist()):
        per_frame = []
        for frame in range(SHAPE[2]):
            if frame != pivot:
                root = (beta**2 + 1) ** 0.5
                phi_predicted = root * predicted[sample, :, frame] - beta * predicted[sample, :, pivot]
                phi_target = root * target[sample, :, frame] - beta * target[sample, :, pivot]
                per_frame.append((phi_predicted - phi_target).square().mean())
        expected.append(torch.stack(per_frame).mean())
    torch.testing.assert_close(temporal_loss(predicted, target, anchor, beta), torch.stack(expected))


def test_an_error_shared_by_all_frames_weighs_little() -> None:
    shared = normal(3, CHANNELS, 1, 4, 6).expand(SHAPE)
    target = normal(*SHAPE, seed=1)
    temporal = temporal_loss(target + shared, target, torch.tensor([0, 1, 3]))
    plain = velocity_loss(target + shared, target)
    torch.testing.assert_close(temporal, (2**0.5 - 1) ** 2 * plain, atol=0, rtol=1e-4)
    independent = normal(*SHAPE, seed=3)
    temporal = temporal_loss(target + independent, target, torch.tensor([0, 1, 3]))
    assert (temporal > 2 * velocity_loss(target + independent, target)).all()

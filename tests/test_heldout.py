"""Held-out loss: two measurements differ by the adapter alone."""

import numpy as np
import pytest
import torch
from synthetic import unit_stats, write_config, write_data

from mochi_lora.config.load import load_config
from mochi_lora.config.schema import ObjectiveConfig
from mochi_lora.data.cache import Cache
from mochi_lora.model.adapter import attach
from mochi_lora.training.batches import SampleSource
from mochi_lora.training.heldout import band_sigmas, clip_losses, summarise

BANDS = 3


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny):
    config = load_config(write_config(tmp_path_factory.mktemp("data") / "run.yaml", tiny), [])
    index = write_data(config, held_out=3)

    def source(seed: int = 1, **objective) -> SampleSource:
        entries = tuple(index.of("validation"))
        return SampleSource(Cache(config.data.cache), entries, unit_stats(), ObjectiveConfig(**objective), seed)

    return source


def measured(model, source) -> list[list[float]]:
    return [clip_losses(model, source, item, BANDS) for item in range(3)]


def test_the_same_model_gives_the_same_numbers_and_another_adapter_others(make, load_tiny):
    model = load_tiny()
    first = measured(model, make())
    assert measured(model, make()) == first
    for parameter in attach(model.transformer, load_config(None, []).adapter, 0).values():
        parameter.data.fill_(0.02)
    changed = measured(model, make())
    assert np.abs(np.array(changed) / np.array(first) - 1).min() > 1e-4
    assert measured(model, make(seed=2)) != changed


def test_a_clip_is_measured_alike_whoever_measures_it_and_after_whatever(make, load_tiny):
    """Ranks share the clips: a clip's numbers may not depend on which others the rank has."""
    model = load_tiny()
    alone = clip_losses(model, make(), 2, BANDS)
    assert measured(model, make())[2] == alone


def test_no_gradient_and_no_random_state_is_touched(make, load_tiny):
    model = load_tiny()
    parameters = attach(model.transformer, load_config(None, []).adapter, 0)
    state = torch.random.get_rng_state(), str(np.random.get_state())
    measured(model, make())
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert str(np.random.get_state()) == state[1]
    assert all(parameter.grad is None for parameter in parameters.values())


def test_training_settings_do_not_change_the_yardstick(make, load_tiny):
    model = load_tiny()
    plain = measured(model, make())
    assert measured(model, make(sigma="logit_normal", caption_dropout=1.0, temporal_weight=3.0)) == plain


def test_bands_are_the_middles_of_equal_parts_in_order():
    assert band_sigmas(4) == (0.125, 0.375, 0.625, 0.875)
    assert band_sigmas(1) == (0.5,)


def test_each_bands_mean_is_reported_under_its_sigma():
    result = summarise([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]], seed=0)
    assert result.bands == (2.0, 3.0, 7.0)
    assert result.loss == 4.0
    assert result.scalars() == {
        "heldout/loss": 4.0,
        "heldout/loss_low": result.low,
        "heldout/loss_high": result.high,
        "heldout/sigma_0.167": 2.0,
        "heldout/sigma_0.500": 3.0,
        "heldout/sigma_0.833": 7.0,
    }


def test_the_interval_holds_the_mean_repeats_itself_and_has_the_size_of_the_standard_error():
    values = np.random.default_rng(0).normal(5.0, 1.0, (50, 1))
    result = summarise(values.tolist(), seed=3)
    assert result.low < result.loss < result.high
    assert result == summarise(values.tolist(), seed=3)
    expected = 2 * 1.96 * float(values.std()) / 50**0.5
    assert result.high - result.low == pytest.approx(expected, rel=0.1)


def test_the_clip_is_the_unit_not_the_band():
    """Many bands of one clip are one observation: measuring more bands must not pretend to more certainty."""
    few = summarise([[1.0], [2.0], [3.0]], seed=0)
    many = summarise([[1.0] * 100, [2.0] * 100, [3.0] * 100], seed=0)
    assert (many.low, many.high) == (few.low, few.high)


def test_one_clip_has_no_interval():
    result = summarise([[1.0, 2.0]], seed=0)
    assert result.loss == 1.5
    assert np.isnan(result.low)
    assert np.isnan(result.high)

"""Noise levels of training: the distribution each setting promises, from (seed, position) alone."""

import math
from collections import Counter

import numpy as np
import pytest

from mochi_lora.config.schema import ObjectiveConfig
from mochi_lora.streams import Purpose
from mochi_lora.training.noise_levels import draw_sigma

COUNT = 10_000
SETTINGS = {
    "uniform": ObjectiveConfig(sigma="uniform"),
    "logit_normal": ObjectiveConfig(sigma="logit_normal"),
    "stratified": ObjectiveConfig(sigma="stratified", strata=8),
}


def draws(objective: ObjectiveConfig, seed: int = 0, count: int = COUNT) -> np.ndarray:
    return np.array([draw_sigma(objective, seed, position) for position in range(count)])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_level_lies_between_data_and_noise(name: str) -> None:
    sigmas = draws(SETTINGS[name])
    assert 0 < sigmas.min() < 0.05
    assert 0.95 < sigmas.max() < 1


@pytest.mark.parametrize("name", ["uniform", "stratified"])
def test_uniform_and_stratified_levels_are_uniform_over_all(name: str) -> None:
    sigmas = draws(SETTINGS[name])
    assert abs(sigmas.mean() - 0.5) < 0.01
    assert abs(sigmas.var() - 1 / 12) < 0.002
    counts = np.histogram(sigmas, bins=20, range=(0, 1))[0]
    assert np.abs(counts - COUNT / 20).max() < 5 * math.sqrt(COUNT / 20)


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (-1.0, 0.5)])
def test_the_logit_of_logit_normal_levels_is_normal(mean: float, spread: float) -> None:
    sigmas = draws(ObjectiveConfig(sigma="logit_normal", logit_mean=mean, logit_std=spread))
    logits = (np.log(sigmas) - np.log1p(-sigmas) - mean) / spread
    assert abs(logits.mean()) < 0.04
    assert abs(logits.std() - 1) < 0.03
    assert abs((np.abs(logits) < 1).mean() - math.erf(2**-0.5)) < 0.02


def test_a_higher_logit_mean_is_more_noise() -> None:
    noisy, clean = (draws(ObjectiveConfig(sigma="logit_normal", logit_mean=m), count=500).mean() for m in (2.0, -2.0))
    assert noisy > 0.8
    assert clean < 0.2


@pytest.mark.parametrize("strata", [2, 5, 16])
def test_each_block_of_positions_visits_every_band_exactly_once(strata: int) -> None:
    sigmas = draws(ObjectiveConfig(sigma="stratified", strata=strata), count=strata * 40).reshape(40, strata)
    bands = np.floor(sigmas * strata).astype(int)
    assert np.array_equal(np.sort(bands, axis=1), np.tile(np.arange(strata), (40, 1)))


def test_bands_come_in_another_order_in_each_block_and_every_band_in_every_place() -> None:
    strata = 4
    sigmas = draws(ObjectiveConfig(sigma="stratified", strata=strata), count=strata * 600).reshape(600, strata)
    orders = Counter(map(tuple, np.floor(sigmas * strata).astype(int)))
    assert len(orders) == math.factorial(strata)
    assert max(orders.values()) < 3 * 600 / math.factorial(strata)


def test_a_block_of_stratified_levels_varies_less_than_a_uniform_one() -> None:
    def spread(name: str) -> float:
        return draws(SETTINGS[name], count=8000).reshape(-1, 8).mean(axis=1).std()

    assert spread("stratified") < 0.25 * spread("uniform")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_level_is_a_function_of_seed_and_position(name: str) -> None:
    objective, positions = SETTINGS[name], [5, 3, 1000, 3, 0]
    once = [draw_sigma(objective, 1, position) for position in positions]
    np.random.seed(0)
    assert [draw_sigma(objective, 1, position) for position in reversed(positions)] == once[::-1]
    assert once[1] == once[3]
    assert draw_sigma(objective, 2, 5) != once[0]
    assert len(set(once)) == 4


def test_other_settings_of_the_objective_do_not_move_the_levels() -> None:
    other = ObjectiveConfig(sigma="uniform", caption_dropout=0.9, temporal_weight=1.0, logit_mean=3.0, strata=4)
    assert draw_sigma(other, 0, 9) == draw_sigma(SETTINGS["uniform"], 0, 9)


def test_levels_come_from_their_own_streams(monkeypatch) -> None:
    from mochi_lora.training import noise_levels

    asked, real = [], noise_levels.stream
    monkeypatch.setattr(noise_levels, "stream", lambda *address: (asked.append(address), real(*address))[1])
    draw_sigma(SETTINGS["stratified"], 3, 21)
    assert asked == [(3, Purpose.SIGMA, 21), (3, Purpose.STRATA, 2)]

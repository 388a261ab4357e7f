"""Random streams: the same for the same address, apart for different ones, and nobody else's business."""

from itertools import combinations

import numpy as np
import pytest
import torch

from mochi_lora.streams import Purpose, normal, stream, uniform

ADDRESS = (7, Purpose.NOISE, 11, 3)
NEIGHBOURS = {
    "seed": (8, Purpose.NOISE, 11, 3),
    "purpose": (7, Purpose.SIGMA, 11, 3),
    "position": (7, Purpose.NOISE, 12, 3),
    "lane": (7, Purpose.NOISE, 11, 4),
    "position and lane exchanged": (7, Purpose.NOISE, 3, 11),
    "seed and purpose exchanged": (int(Purpose.NOISE), Purpose(7), 11, 3),
}


def words(address: tuple, count: int = 100_000) -> set[int]:
    """The raw 64-bit numbers a stream is made of: any overlap of two streams shows here, shifted or not."""
    return set(stream(*address).bit_generator.random_raw(count).tolist())


def test_an_address_gives_its_numbers_whatever_was_drawn_before() -> None:
    first = stream(*ADDRESS).random(5)
    stream(*ADDRESS).random(1000)
    stream(7, Purpose.NOISE, 12).random(3)
    assert np.array_equal(stream(*ADDRESS).random(5), first)
    assert np.array_equal(normal(7, Purpose.NOISE, 11, (2, 3), 3), normal(7, Purpose.NOISE, 11, (2, 3), 3))
    assert uniform(7, Purpose.SIGMA, 2) == uniform(7, Purpose.SIGMA, 2)


@pytest.mark.parametrize("other", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_streams_of_different_addresses_share_no_number(other: tuple) -> None:
    assert not words(ADDRESS) & words(other)


def test_the_overlap_test_would_find_an_overlap() -> None:
    late = stream(*ADDRESS)
    late.random(50_000)
    assert words(ADDRESS) & set(late.bit_generator.random_raw(100).tolist())


def test_positions_and_seeds_do_not_collide_as_32_bit_seeds_would() -> None:
    first = {int(stream(0, Purpose.NOISE, position).bit_generator.random_raw()) for position in range(20_000)}
    assert len(first) == 20_000
    wide = [int(stream(seed, Purpose.NOISE).bit_generator.random_raw()) for seed in (0, 2**32, 2**62, 2**63 - 1)]
    assert len(set(wide)) == 4
    far = [int(stream(0, Purpose.NOISE, position).bit_generator.random_raw()) for position in (0, 2**32, 2**40)]
    assert len(set(far)) == 3


def test_noise_of_neighbouring_positions_is_uncorrelated_and_standard_normal() -> None:
    draws = [normal(0, Purpose.NOISE, position, (50_000,)) for position in range(3)]
    for first, second in combinations(draws, 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    for draw in draws:
        assert draw.dtype == np.float32
        assert abs(draw.mean()) < 0.02
        assert abs(draw.std() - 1) < 0.02


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = normal(*ADDRESS[:3], (4,))
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    np.random.seed(2)
    torch.manual_seed(2)
    assert np.array_equal(normal(*ADDRESS[:3], (4,)), first)


def test_purposes_keep_their_numbers() -> None:
    """They are part of every run's identity: new ones are appended, none is renumbered."""
    names = ["ORDER", "POSTERIOR", "NOISE", "SIGMA", "CAPTION_DROPOUT", "ANCHOR", "STRATA", "HELD_OUT", "MODULE", "ADAPTER"]
    names += ["SAMPLING", "BOOTSTRAP"]
    assert [Purpose(number).name for number in range(1, 13)] == names
    assert len(Purpose.__members__) == len(set(Purpose)), "two purposes share a number"


def test_streams_keep_their_numbers_across_versions() -> None:
    assert stream(0, Purpose.ORDER).bit_generator.random_raw(2).tolist() == [15003734204198539638, 13859618513508960101]
    assert stream(*ADDRESS).bit_generator.random_raw(2).tolist() == [7445623589246992843, 7462907452932249533]
    assert normal(0, Purpose.NOISE, 1, (3,)) == pytest.approx(
        [0.2122001051902771, 1.0441278219223022, 1.3016135692596436], abs=1e-7
    )
    assert uniform(0, Purpose.SIGMA, 1) == pytest.approx(0.685732034311352, abs=1e-15)
    assert stream(0, Purpose.ORDER, 2).permutation(6).tolist() == [5, 1, 2, 3, 4, 0]

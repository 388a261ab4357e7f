"""Several parts in one data set: their settings, their captions, and how often each is drawn."""

from collections import Counter
from pathlib import Path

import pytest
from tiny_commands import config_of, make_image, mixed

from mochi_lora.cli import main
from mochi_lora.commands.train import _Sources
from mochi_lora.config.load import load_config
from mochi_lora.config.problems import ConfigError
from mochi_lora.config.schema import DataConfig
from mochi_lora.data.cache import EncoderIdentity
from mochi_lora.data.clip_plan import Shapes
from mochi_lora.data.index import Index, IndexEntry, index_path, read_index
from mochi_lora.data.mix import Part, list_part, parts_of, pools_of
from mochi_lora.data.plan import BatchPlan, Share, plan_epoch
from mochi_lora.errors import UserError
from mochi_lora.runs.identity import run_identity
from mochi_lora.spec import Bucket

WIDE, TALL = Bucket(7, 32, 48), Bucket(7, 48, 32)
SHAPES = Shapes((WIDE, TALL), upscale=False)


def _parts(*rates: tuple[int, float | None]) -> list[Part]:
    return [Part(number, Path(f"p{number}"), SHAPES, "", *rate) for number, rate in enumerate(rates)]


def _draws(buckets, owners, parts) -> Counter[int]:
    found: Counter[int] = Counter()
    for pool in pools_of(buckets, owners, parts):
        found[owners[pool.items[0]]] += pool.draws
    return found


# --- settings -----------------------------------------------------------------------------------------------------------


def test_an_entry_takes_from_data_what_it_leaves_out():
    data = DataConfig(
        buckets=["7x32x48"],
        upscale=True,
        mix=[{"clips": "a"}, {"clips": "b", "buckets": ["13x32x48"], "upscale": False, "repeats": 3, "trigger": " chalk "}],
    )
    first, second = parts_of(data)
    assert first == Part(0, Path("a"), Shapes((WIDE,), upscale=True))
    assert second == Part(1, Path("b"), Shapes((Bucket(13, 32, 48),), upscale=False), "chalk", 3)


def test_without_a_mix_the_clips_are_the_only_part():
    (part,) = parts_of(DataConfig(clips="films", buckets=["7x32x48", "7x48x32"]))
    assert part == Part(0, Path("films"), SHAPES)


@pytest.mark.parametrize(
    ("mix", "told"),
    [
        ("[{clips: a, weight: 1}, {clips: b}]", "data.mix: 1 of 2 entries have a weight: give every entry one, or none"),
        ("[{clips: a, repeats: 0}]", "data.mix[0].repeats: got 0, expected greater than or equal to 1"),
        ("[{clips: a, repeats: true}]", "data.mix[0].repeats: got true"),
        ("[{clips: a}, {clips: b, weight: 0}]", "data.mix[1].weight: got 0, expected greater than 0"),
        ("[{clips: a, buckets: [8x32x48]}]", "data.mix[0].buckets[0]: 8 frames"),
        ("[{repeats: 2}]", "data.mix[0].clips: got {'repeats': 2}, expected a value for clips"),
        ("[{clips: a, times: 2}]", "data.mix[0].times: unknown key; an entry of data.mix has clips, repeats, weight, trigger"),
        ("[a]", "data.mix[0]: got 'a', expected settings"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_place(mix, told):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["--data.mix", mix])
    assert told in str(caught.value)


def test_clips_and_mix_together_are_refused():
    with pytest.raises(ConfigError, match=r"data.mix: given together with data.clips \(films\)"):
        load_config(None, ["--data.mix", "[{clips: a}]", "--data.clips", "films"])


def test_each_mix_has_an_index_of_its_own_and_repeats_and_weights_make_none():
    def path(**entry):
        return index_path(DataConfig(mix=[{"clips": "a", **entry}]))

    assert len({path(), path(trigger="x"), path(buckets=["7x32x48"]), path(upscale=True), index_path(DataConfig())}) == 5
    assert path(repeats=4, weight=2.0) == path()


# --- captions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a fox", "chalk style, a fox"),
        ("A fox in Chalk Style.", "A fox in Chalk Style."),
        ("chalk style, a fox", "chalk style, a fox"),
        ("a chalk  style fox", "a chalk  style fox"),
        ("A chalk styled fox", "chalk style, A chalk styled fox"),
    ],
)
def test_the_trigger_stands_before_captions_that_do_not_hold_it(tmp_path, caption, expected):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text(caption)
    data = DataConfig(mix=[{"clips": tmp_path, "trigger": "chalk style,"}])
    ((source,), _) = list_part(parts_of(data)[0], data)
    assert source.caption == expected


def test_a_part_that_cannot_be_listed_is_named_by_its_place(tmp_path):
    data = DataConfig(mix=[{"clips": tmp_path}, {"clips": tmp_path / "none"}])
    with pytest.raises(UserError, match=r"^data.mix\[1\]: .*none does not exist"):
        list_part(parts_of(data)[1], data)


# --- draws --------------------------------------------------------------------------------------------------------------

OWNERS = [0] * 10 + [1] * 4 + [2] * 30
BUCKETS = [WIDE if number % 3 else TALL for number in range(len(OWNERS))]


def test_repeats_count_how_often_a_clip_comes_in_an_epoch():
    parts = _parts((2, None), (5, None), (1, None))
    assert _draws(BUCKETS, OWNERS, parts) == {0: 20, 1: 20, 2: 30}
    steps = plan_epoch(BUCKETS, 3, 1, 1, pools_of(BUCKETS, OWNERS, parts))
    counts = Counter(item for (item,) in steps)
    assert all(counts[item] == parts[owner].repeats for item, owner in enumerate(OWNERS))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5, 1, 4), (0.7, 0.2, 0.1), (100, 1, 1)])
@pytest.mark.parametrize("repeats", [(1, 1, 1), (1, 3, 2)])
def test_weights_are_shares_and_every_clip_still_comes_its_repeats(weights, repeats):
    parts = _parts(*zip(repeats, weights, strict=True))
    draws = _draws(BUCKETS, OWNERS, parts)
    total, least = draws.total(), {0: 10 * repeats[0], 1: 4 * repeats[1], 2: 30 * repeats[2]}
    for owner, weight in enumerate(weights):
        assert abs(draws[owner] - total * weight / sum(weights)) <= 1
        assert draws[owner] >= least[owner]
    assert any(draws[owner] == least[owner] for owner in draws), "the epoch is longer than it has to be"
    counts = Counter(item for (item,) in plan_epoch(BUCKETS, 0, 0, 1, pools_of(BUCKETS, OWNERS, parts)))
    for item, owner in enumerate(OWNERS):
        even = draws[owner] / OWNERS.count(owner)
        assert repeats[owner] <= counts[item]
        assert abs(counts[item] - even) < 2  # one for the shape's rounding, one for the clip's


def test_over_many_epochs_the_clips_of_a_part_come_equally_often():
    parts = _parts((1, 3), (1, 1), (1, 2))
    plan = BatchPlan(tuple(BUCKETS), 5, 2, pools_of(BUCKETS, OWNERS, parts))
    epochs = 200
    counts = Counter(item for step in range(epochs * plan.steps_per_epoch) for item in plan.items(step))
    shares = Counter()
    for item, count in counts.items():
        shares[OWNERS[item]] += count / counts.total()
    assert [round(shares[owner], 2) for owner in range(3)] == [0.5, 0.17, 0.33]
    of_first = [counts[item] / epochs for item in range(10)]
    assert max(of_first) - min(of_first) < 0.35, of_first


def test_a_part_whose_clips_were_all_refused_changes_nothing_of_the_others():
    parts = _parts((1, 1), (1, 100), (1, 3))
    buckets, owners = [WIDE] * 8, [0] * 2 + [2] * 6
    assert _draws(buckets, owners, parts) == {0: 2, 2: 6}


def test_weights_that_would_make_an_endless_epoch_are_refused_with_the_part():
    with pytest.raises(UserError, match=r"each of the 30 clips of p2 1 times at weight 1e-09, an epoch would have .* raise"):
        pools_of(BUCKETS, OWNERS, _parts((1, 1), (1, 1), (1, 1e-9)))


# --- going on -----------------------------------------------------------------------------------------------------------


def _identity(*mix: dict):
    config = load_config(None, [f"--data.mix={list(mix)}"] if mix else [])
    encoder = EncoderIdentity("0", "fp32")
    entries = (IndexEntry("a", "0", "7x32x48", "l", "t", "c", "train"),)
    return run_identity(config, Index("b", None, encoder, encoder, (0.0,), (1.0,), 1.0, entries), "f", 1)


def test_a_run_does_not_go_on_with_other_repeats_or_weights():
    plain = _identity()
    assert not [name for name in plain if name.startswith("data.mix")], "runs without a mix go on from earlier versions"
    found = [_identity({"clips": "a"}), _identity({"clips": "a", "repeats": 2}), _identity({"clips": "a", "weight": 2.0})]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])
    assert _identity({"clips": "b"}) == found[0], "where the clips lie is no part of a run"


def test_training_draws_what_the_mix_says(tiny, tmp_path):
    """Through the index and the loader: an epoch's batches, counted by the clip that they name."""
    for part, count in (("few", 2), ("many", 5)):
        for number in range(count):
            make_image(tmp_path / part / f"{part}{number}.png", colour=40 * number + len(part))
    mix = [{"clips": str(tmp_path / "few"), "repeats": 3}, {"clips": str(tmp_path / "many")}]
    still = [
        "--data.validation_fraction",
        "0",
        "--data.loader_workers",
        "0",
        "--train.steps",
        "22",
        "--train.warmup_steps",
        "0",
    ]
    words = [*mixed(tiny, tmp_path / "cache", mix, "1x32x48"), *still]
    assert main(["encode", *words]) == 0
    config = config_of(words)
    batches = _Sources.of(config, read_index(config.data)).batches(config, Share(1, 1), 0, pin=False)
    names = [Path(name).stem for _, micro_steps in batches for batch in micro_steps for name in batch.clips]
    for epoch in (names[:11], names[11:]):
        assert Counter(epoch) == {"few0": 3, "few1": 3} | {f"many{number}": 1 for number in range(5)}
    assert names[:11] != names[11:]

"""Loss per noise level: same clips, same noise, with and without the adapter."""

import numpy as np
import pytest
from synthetic import unit_stats, write_config, write_data

from mochi_lora.config.load import load_config
from mochi_lora.config.schema import ObjectiveConfig
from mochi_lora.data.cache import Cache
from mochi_lora.evaluation.losses import Sides, band_losses, from_tables
from mochi_lora.evaluation.results import BandLoss, Missing
from mochi_lora.model.adapter import TRAINED, attach, strengths
from mochi_lora.training.batches import SampleSource
from mochi_lora.training.heldout import clip_losses

BANDS = 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny):
    config = load_config(write_config(tmp_path_factory.mktemp("data") / "run.yaml", tiny), [])
    index = write_data(config, clips=3, held_out=2)
    return [
        SampleSource(Cache(config.data.cache), tuple(index.of(split)), unit_stats(), ObjectiveConfig(), 1)
        for split in ("validation", "train")
    ]


@pytest.fixture
def adapted(load_tiny):
    model = load_tiny()
    for parameter in attach(model.transformer, load_config(None, []).adapter, 0).values():
        parameter.data.fill_(0.05)
    return model


def measured(model, sources, **more) -> tuple[BandLoss, ...]:
    result = band_losses(model, *sources, BANDS, lambda: strengths(model.transformer, [TRAINED], [0.0]), **more)
    assert isinstance(result, tuple)
    return result


def test_every_number_is_the_mean_loss_of_its_clips(sources, adapted, load_tiny):
    calls = []
    bands = measured(adapted, sources, on_clip=lambda: calls.append(1))
    assert [band.sigma for band in bands] == [0.25, 0.75]
    assert len(calls) == 2 * (2 + 3)
    base = load_tiny()
    for model, names in ((adapted, ("adapter_held_out", "adapter_training")), (base, ("base_held_out", "base_training"))):
        for source, name in zip(sources, names, strict=True):
            table = np.array([clip_losses(model, source, item, BANDS) for item in range(len(source.entries))])
            assert [getattr(band, name).value for band in bands] == pytest.approx(table.mean(axis=0), rel=1e-6)
    assert abs(bands[0].adapter_held_out.value / bands[0].base_held_out.value - 1) > 1e-3


def test_an_untrained_adapter_has_the_losses_of_its_base(sources, load_tiny):
    model = load_tiny()
    attach(model.transformer, load_config(None, []).adapter, 0)
    for band in measured(model, sources):
        assert band.adapter_held_out == band.base_held_out
        assert band.adapter_training == band.base_training


def test_the_clip_is_the_unit():
    """Clips that differ widen an interval; bands do not lend each other certainty."""
    alike, unlike = np.full((6, 2), 1.0), np.stack([np.full(6, 1.0), np.arange(6.0)], axis=1)
    first, second = from_tables(Sides(alike, alike), Sides(unlike, alike), seed=0)
    assert first.adapter_held_out == first.base_held_out
    assert (first.base_held_out.low, first.base_held_out.high) == (1.0, 1.0)
    assert second.adapter_held_out.value == 2.5
    assert second.adapter_held_out.low < 2.0
    assert second.adapter_held_out.high > 3.0


@pytest.mark.parametrize(("side", "named"), [(0, "held-out clips is 1"), (1, "training clips is 1")])
def test_one_clip_has_no_interval(sources, adapted, side, named):
    few = list(sources)
    source = few[side]
    few[side] = SampleSource(source.cache, source.entries[:1], source.stats, source.objective, source.seed)
    result = band_losses(adapted, *few, BANDS, lambda: strengths(adapted.transformer, [TRAINED], [0.0]))
    assert isinstance(result, Missing)
    assert named in result.because

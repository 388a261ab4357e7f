"""Pictures of scenes: exact geometry, the same bytes every time, two styles nobody confuses."""

import numpy as np
import pytest
import torch

from mochi_lora.tiny import render, scenery, world
from mochi_lora.tiny.looks import LOOKS


def scenes(count, **choices):
    return [world.draw_scene(3, index, **{"held_out": False, "motions": world.MOTIONS, **choices}) for index in range(count)]


def lone(shape="square", colour="red", background="wall", **unsaid):
    return world.Scene(shape, colour, background, "still", "big", **{"x": 48.0, "y": 32.0, "radius": 14.0, **unsaid})


def cover_of(frames, scene):
    """Share of each pixel the object covers, from the colour mixture of a base rendering."""
    ground = scenery.background_picture(scene.background, "base").round()
    contrast = np.float32(scenery.PALETTE[scene.colour]) - ground
    return ((frames - ground) * contrast).sum(-1) / (contrast**2).sum(-1)


@pytest.mark.parametrize("style", [*scenery.STYLES, *LOOKS], ids=str)
def test_a_batch_is_its_scenes_one_by_one(style):
    some = scenes(11)
    together = render.render_batch(render.scene_batch(some), style)
    assert together.shape == (11, 25, 64, 96, 3)
    assert together.dtype == torch.uint8
    for scene, frames in zip(some, together.numpy(), strict=True):
        assert np.array_equal(render.render(scene, style), frames)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_object_is_where_the_track_says(shape):
    for scene in (s for s in scenes(120) if s.shape == shape):
        cover = cover_of(render.render(scene).astype(np.float32), scene)
        mass = cover.sum((1, 2))
        path = world.track(scene)
        assert np.abs((cover.sum(1) @ (np.arange(96) + 0.5)) / mass - path.x).max() < 0.1
        assert np.abs((cover.sum(2) @ (np.arange(64) + 0.5)) / mass - path.y).max() < 0.1
        assert np.ptp(np.sqrt(mass) / path.radius) < 0.03, "area follows the radius"


def test_areas_are_those_of_the_shapes():
    tip, hollow = 1.3, 0.62
    unit = {
        "circle": np.pi,
        "square": (2 * 0.87) ** 2,
        "triangle": 3 * np.sqrt(3) / 4 * 1.3**2,
        "star": 5 * tip * hollow * np.sin(np.pi / 5),
        "cross": 4 * 1.1 * 0.4 * 2 - (2 * 0.4) ** 2,
    }
    for shape, area in unit.items():
        scene = lone(shape)
        cover = cover_of(render.render(scene)[0].astype(np.float32), scene)
        assert cover.sum() == pytest.approx(area * 14**2, rel=0.01), shape


@pytest.mark.parametrize("shape", world.SHAPES)
def test_no_shape_reaches_beyond_its_extent(shape):
    scene = lone(shape)
    rows, columns = np.nonzero(cover_of(render.render(scene)[0].astype(np.float32), scene) > 0.5)
    reach = max(abs(rows + 0.5 - 32).max(), abs(columns + 0.5 - 48).max())
    assert 0.8 * 14 < reach <= world.EXTENT * 14


def test_star_and_triangle_point_up():
    for shape in ("star", "triangle"):
        frame = cover_of(render.render(lone(shape))[0].astype(np.float32), lone(shape))
        widths = (frame > 0.5).sum(1)
        rows = np.flatnonzero(widths)
        assert widths[rows[0] : rows[0] + 3].max() <= 4
        assert rows[0] < 32 - 14


def test_edges_are_antialiased():
    half = lone(x=48.25)  # edges at 48.25 +- 12.18
    cover = cover_of(render.render(half)[0, 32].astype(np.float32), half)[32]
    assert cover[48] == pytest.approx(1.0, abs=0.01)
    assert cover[60] == pytest.approx(0.43, abs=0.02)
    assert cover[61] == pytest.approx(0.0, abs=0.01)


def test_backgrounds_are_rows_of_one_colour_and_desaturated():
    for name in world.BACKGROUNDS:
        picture = scenery.background_picture(name, "base")
        assert np.ptp(picture, axis=1).max() == 0
        assert 2 * np.ptp(picture, axis=2).max() < min(np.ptp(rgb) for rgb in scenery.PALETTE.values())


def test_chalk_is_an_outline_on_a_board():
    scene = lone("circle", "yellow", "sky")
    frame = render.render(scene, "chalk")[0].astype(int)
    board = np.array(scenery.BOARD)
    assert np.abs(frame[28:36, 44:52] - board).max() < 30, "the inside is board"
    stroke = frame[32, 48 + 12 : 48 + 16].astype(float)
    red, green, blue = stroke[np.ptp(stroke, axis=1).argmax()]
    assert red > 150
    assert green > 120
    assert min(red, green) > blue + 50, "the stroke is still yellow"
    hidden = render.render(lone("square", "red", "wall", y=48.0), "chalk")[0].astype(int)
    assert np.ptp(hidden[44:56, 42:54], axis=(0, 1)).max() < 30, "the object hides the scenery's lines"


def test_chalk_shows_which_background_it_is():
    pictures = [scenery.background_picture(name, "chalk") for name in world.BACKGROUNDS]
    for one in range(4):
        for other in range(one):
            assert (np.abs(pictures[one] - pictures[other]).max(-1) > 40).mean() > 0.01


def test_random_outlines_follow_the_generator_and_keep_off_the_board():
    batch = render.scene_batch(scenes(40))
    frames = render.render_outlines(batch, np.random.default_rng(5))
    assert torch.equal(frames, render.render_outlines(batch, np.random.default_rng(5)))
    assert not torch.equal(frames, render.render_outlines(batch, np.random.default_rng(6)))
    grounds = frames[:, 0].flatten(1, 2).median(dim=1).values.float()  # rough, and sloping about this colour
    assert (grounds - torch.tensor(scenery.BOARD)).norm(dim=1).min() > 55
    assert len(grounds.unique(dim=0)) == 40


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.word)
def test_a_look_keeps_the_object_in_its_place_and_colour_and_is_not_chalk(look):
    """Else it would teach that words do not matter; or the style an adapter is to bring."""
    still = lone("circle", "red", "wall")
    frame, base, chalk = (render.render(still, style)[0].astype(int) for style in (look, "base", "chalk"))
    rim, ground = frame[32, 48 + 12], np.median(frame[:12].reshape(-1, 3), axis=0)
    assert np.abs(rim - ground).max() > 40, "the object shows"
    assert rim.argmax() == 0, "and is red"
    assert np.abs(frame - base).mean() > (2 if look.word == "stencil" else 10)
    assert np.abs(frame - chalk).mean() > 15
    if look.cover:
        assert np.linalg.norm(np.array(look.ground) - scenery.BOARD) > 60


def test_looks_differ_from_each_other():
    frames = [render.render(lone("star", "blue", "sand"), look)[0].astype(int) for look in LOOKS]
    for one in range(len(LOOKS)):
        for other in range(one):
            assert np.abs(frames[one] - frames[other]).mean() > 10, (LOOKS[one].word, LOOKS[other].word)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_picture():
    some = scenes(50)
    for style in (*scenery.STYLES, *LOOKS):
        here = render.render_batch(render.scene_batch(some), style).int()
        there = render.render_batch(render.scene_batch(some, "cuda"), style).int().cpu()
        assert (here - there).abs().max() <= 1

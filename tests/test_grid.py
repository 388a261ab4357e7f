"""The grid of an evaluation: which clips there are, which of them are one video, what is made again."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from footage import run_ffmpeg

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import EvaluationConfig
from mochi_lora.errors import UserError
from mochi_lora.evaluation.grid import plan, strength_zero_is_base, thin
from mochi_lora.evaluation.prompts import prompt_sets
from mochi_lora.evaluation.videos import from_videos
from mochi_lora.inference.playback import read_video
from mochi_lora.inference.shots import Shot, describe, in_switching_order, is_made, write_video
from mochi_lora.inference.tiles import GridRow, write_grids
from mochi_lora.inference.video import write_mp4

SETTINGS = EvaluationConfig(trigger="sks", prompts=["sks, a fox", "sks, a boat"], unrelated=["a dog"], strengths=[0, 0.5, 1])


@pytest.fixture
def adapters(tmp_path):
    """Files of a run: the last checkpoint is the final adapter."""
    contents = {"adapter": b"c", "step-1": b"a", "step-2": b"b", "step-3": b"c"}
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    return tmp_path


def planned(adapters, *, quick=False, settings=SETTINGS):
    steps = [(number, adapters / f"step-{number}.safetensors") for number in (1, 2, 3)]
    return plan(prompt_sets(settings), adapters / "adapter.safetensors", settings, checkpoints=steps, quick=quick)


def test_base_and_adapter_are_made_on_all_sets_and_the_rest_on_trigger_prompts(adapters):
    counts = Counter((cell.label, cell.strength, cell.prompt_set) for cell in planned(adapters))
    everywhere = {"trigger": 4, "plain": 4, "unrelated": 2}
    expected = {
        (label, strength, name): n for label, strength in (("base", 0), ("adapter", 1)) for name, n in everywhere.items()
    }
    only = [("adapter", 0, "trigger"), ("adapter", 0.5, "trigger"), *((f"step {number}", 1, "trigger") for number in (1, 2, 3))]
    assert counts == expected | dict.fromkeys(only, 4)


def test_cells_that_mean_one_video_share_it(adapters):
    cells = planned(adapters)
    by_video = {}
    for cell in cells:
        assert by_video.setdefault(cell.shot.video, cell.shot) == cell.shot
    made = {(shot.prompt, shot.seed, shot.adapters) for shot in by_video.values()}
    assert len(made) == len(by_video), "no video is made under two names"
    # 10 base, 10 adapter, 4 at 0.5, 1 proof at 0, 4 + 4 of two checkpoints; the third is the adapter itself.
    assert len(by_video) == 33
    assert all(cell.shot.video.startswith("adapter/") for cell in cells if cell.label == "step 3")


def test_strength_zero_is_made_once_as_a_proof_and_else_is_the_base(adapters):
    zero = [cell for cell in planned(adapters) if cell.label == "adapter" and cell.strength == 0]
    assert [bool(cell.shot.adapters) for cell in zero] == [True, False, False, False]
    assert zero[0].shot.adapters[0].strength == 0
    assert {Path(cell.shot.video).parent.name for cell in zero[1:]} == {"base"}


def test_quick_is_eight_trigger_prompts_one_seed_three_strengths(adapters):
    settings = SETTINGS.model_copy(update={"prompts": [f"sks, thing {number}" for number in range(10)]})
    cells = planned(adapters, quick=True, settings=settings)
    assert Counter((cell.label, cell.strength) for cell in cells) == {
        ("base", 0): 8,
        ("adapter", 1): 8,
        ("adapter", 0): 8,
        ("adapter", 0.5): 8,
    }
    assert {cell.prompt_set for cell in cells} == {"trigger"}
    assert {cell.shot.seed for cell in cells} == {0}
    assert len({cell.shot.video for cell in cells}) == 24


def test_names_of_videos_do_not_depend_on_what_else_is_planned(adapters):
    longer = SETTINGS.model_copy(update={"prompts": ["sks, an owl", *SETTINGS.prompts], "strengths": [1.25]})
    names = {
        (c.label, c.shot.prompt, c.shot.seed): c.shot.video
        for c in planned(adapters)
        if c.strength in (0, 1) and c.label != "adapter"
    }
    again = {(c.label, c.shot.prompt, c.shot.seed): c.shot.video for c in planned(adapters, settings=longer)}
    assert names.items() <= again.items()


def test_prompts_that_begin_alike_have_videos_of_their_own(adapters):
    same = "sks, a very long prompt about a fox that walks through the snow "
    settings = SETTINGS.model_copy(update={"prompts": [f"{same}left", f"{same}right"]})
    videos = {
        cell.shot.prompt: cell.shot.video
        for cell in planned(adapters, settings=settings)
        if cell.label == "base" and cell.shot.seed == 0
    }
    assert len(set(videos.values())) == len(videos)


def test_a_row_says_where_its_clip_stands(adapters):
    cell = next(cell for cell in planned(adapters) if cell.label == "step 1")
    row = cell.row({"align.clip": 0.25})
    assert (row.video, row.prompt_set, row.prompt, row.seed) == (cell.shot.video, "trigger", "sks, a fox", 0)
    assert (row.adapter, row.strength, row.values, cell.content) == ("step 1", 1.0, {"align.clip": 0.25}, "a fox")


def test_few_of_many_checkpoints_are_evenly_spaced_with_the_last():
    assert thin(range(10), 4) == (0, 3, 6, 9)
    assert thin(range(3), 4) == (0, 1, 2)
    assert (thin(range(3), 1), thin(range(3), 0)) == ((2,), ())


# --- what is made, and what is there ------------------------------------------------------------------------------------


def shot(video, *adapters):
    return Shot(video, "a fox", 0, tuple(AdapterChoice(Path(path), strength) for path, strength in adapters))


def test_adapters_are_switched_as_seldom_as_can_be():
    shots = [
        shot("1", ("a", 1)),
        shot("2"),
        shot("3", ("b", 1)),
        shot("4", ("a", 0.5)),
        shot("5"),
        shot("6", ("a", 1)),
        shot("2"),
    ]
    assert [[item.video for item in group] for group in in_switching_order(shots)] == [["1", "6", "4"], ["2", "5"], ["3"]]


def test_two_different_videos_cannot_have_one_name():
    with pytest.raises(AssertionError, match="called 1"):
        in_switching_order([shot("1"), shot("1", ("a", 1))])


ORIGIN = {
    "base": "models/x",
    "base_revision": None,
    "base_fingerprint": "f",
    "steps": 4,
    "plan": {"device": "cpu", "checkpointing": "full"},
}


def film(seed=0, frames=3, height=32, width=48):
    return np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


def test_only_what_was_made_the_same_way_counts_as_made(tmp_path):
    path, one = tmp_path / "fox.mp4", shot("fox.mp4", ("a", 0.5))
    about = describe(one, ORIGIN, {Path("a"): "sha"})
    assert not is_made(path, about)
    write_video(path, film(), about)
    assert is_made(path, about)
    moved = describe(shot("fox.mp4", ("elsewhere/a", 0.5)), ORIGIN | {"base": "y"}, {Path("elsewhere/a"): "sha"})
    assert is_made(path, moved | {"plan": {"device": "cpu", "checkpointing": "none"}})
    others = [
        describe(one, ORIGIN, {Path("a"): "trained on"}),
        describe(shot("fox.mp4", ("a", 0.6)), ORIGIN, {Path("a"): "sha"}),
        describe(shot("fox.mp4"), ORIGIN, {}),
        *(about | change for change in ({"prompt": "a boat"}, {"seed": 1}, {"steps": 5}, {"base_fingerprint": "g"})),
        about | {"plan": {"device": "cuda", "checkpointing": "full"}},
    ]
    assert not any(is_made(path, other) for other in others)


def test_a_json_beside_another_video_or_half_a_video_does_not_count(tmp_path):
    path, about = tmp_path / "fox.mp4", describe(shot("fox.mp4"), ORIGIN, {})
    write_video(path, film(), about)
    write_mp4(path, film(1))  # killed before its JSON
    assert not is_made(path, about)
    for wrong in ("", "[]", '{"plan": 3}', '{"adapters": [4]}'):
        path.with_suffix(".json").write_text(wrong)
        assert not is_made(path, about)


def test_the_proof_of_strength_zero_compares_exact_frames(adapters):
    cells = planned(adapters)
    (proof,) = [cell for cell in cells if cell.shot.adapters and cell.strength == 0]
    base = next(cell for cell in cells if cell.label == "base")
    almost = film()
    almost[0, 0, 0, 0] ^= 1
    for frames, same in ((film(), True), (almost, False)):
        write_video(adapters / base.shot.video, film(), {})
        write_video(adapters / proof.shot.video, frames, {})
        assert strength_zero_is_base(cells, adapters) is same
    assert strength_zero_is_base(planned(adapters, quick=True), adapters) is None


# --- videos back, and side by side --------------------------------------------------------------------------------------


def flat(colour, frames=3, height=96, width=192):
    return np.full((frames, height, width, 3), colour, np.uint8)


def test_a_video_comes_back_whole(tmp_path):
    colours = np.arange(7, dtype=np.uint8) * 30
    write_mp4(tmp_path / "a.mp4", np.repeat(colours, 32 * 48 * 3).reshape(7, 32, 48, 3))
    back = read_video(tmp_path / "a.mp4")
    assert back.frames.shape == (7, 32, 48, 3)
    assert np.abs(back.frames.astype(int).mean((1, 2, 3)) - colours).max() < 2
    assert back.fps == pytest.approx(30, rel=1e-3)


def test_colours_come_back_as_they_went(tmp_path):
    """BT.709 in, BT.709 out: read as BT.601, saturated red is off by about 20."""
    write_mp4(tmp_path / "red.mp4", flat((220, 30, 40)))
    assert np.abs(read_video(tmp_path / "red.mp4").frames.mean((0, 1, 2)) - (220, 30, 40)).max() < 4


def test_a_turned_video_comes_back_upright(tmp_path):
    frames = flat(0, frames=2, height=32, width=64)
    frames[:, :, :16] = 255  # white at the left
    write_mp4(tmp_path / "a.mp4", frames)
    run_ffmpeg("-display_rotation", "90", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mov")
    back = read_video(tmp_path / "b.mov").frames
    assert back.shape == (2, 64, 32, 3)
    assert (back[0, -8:].mean() > 240, back[0, :40].mean() < 15) == (True, True), "turned anticlockwise, left is below"


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_an_unreadable_video_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.mp4"):
        read_video(path)


def test_a_grid_shows_each_video_in_its_row_and_column_and_holds_the_last_frame(tmp_path):
    levels = [[0, 60], [120, 180]]
    for row, pair in enumerate(levels):
        for column, level in enumerate(pair):
            frames = flat(level, frames=2 if (row, column) == (0, 1) else 5)
            write_mp4(tmp_path / f"{row}{column}.mp4", frames)
    rows = [GridRow(f"prompt {row}", (tmp_path / f"{row}0.mp4", tmp_path / f"{row}1.mp4")) for row in range(2)]
    (path,) = write_grids(tmp_path, ["base", "adapter"], rows)
    assert path == tmp_path / "grid.mp4"
    frames = read_video(path).frames
    assert frames.shape == (5, 24 + 2 * (24 + 96 + 4), 4 + 2 * (192 + 4), 3)
    middles = frames[-1][[24 + 24 + 48, 24 + 24 + 48 + 124]][:, [4 + 96, 4 + 196 + 96], 0].astype(int)
    assert np.abs(middles - levels).max() < 4
    assert (frames[0, :20].min(), frames[0, :20].max() > 250) < (100, True), "labels are black on white"


def test_rows_that_do_not_fit_go_on_in_the_next_grid(tmp_path):
    write_mp4(tmp_path / "tall.mp4", flat(90, frames=1, height=480, width=192))
    rows = [GridRow(f"prompt {number}", (tmp_path / "tall.mp4",)) for number in range(5)]
    assert [path.name for path in write_grids(tmp_path, ["base"], rows)] == ["grid-1.mp4", "grid-2.mp4"]
    assert read_video(tmp_path / "grid-2.mp4").frames.shape[1] < read_video(tmp_path / "grid-1.mp4").frames.shape[1]


def test_many_columns_shrink_the_tiles(tmp_path):
    write_mp4(tmp_path / "wide.mp4", flat(90, frames=1, height=64, width=600))
    (path,) = write_grids(tmp_path, [str(number) for number in range(6)], [GridRow("x", (tmp_path / "wide.mp4",) * 6)])
    assert 1850 < read_video(path).frames.shape[2] <= 1920


# --- clips made elsewhere -----------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    for side, level in (("base", 40), ("adapter", 200)):
        for name in ("fox", "plain", "dog"):
            write_mp4(tmp_path / side / f"{name}.mp4", flat(level, frames=2, height=16, width=16))
    for name, prompt in (("fox", "sks, a fox"), ("plain", "a fox"), ("dog", "a dog")):
        (tmp_path / "base" / f"{name}.json").write_text(json.dumps({"prompt": prompt, "seed": 3, "steps": 64}))
    return tmp_path


def listed(folder, *lines):
    (folder / "videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(side, name, prompt="sks, a fox", **more):
    return {"video": f"{side}/{name}.mp4", "prompt": prompt, "adapter": side, **more}


def test_folders_of_videos_become_pairs_with_sets_told_by_the_prompts(elsewhere):
    cells = from_videos(elsewhere, "sks")
    found = {(cell.label, cell.shot.video, cell.prompt_set, cell.content, cell.shot.seed) for cell in cells}
    expected = {("fox", "trigger", "a fox"), ("plain", "plain", "a fox"), ("dog", "unrelated", "a dog")}
    assert found == {
        (side, f"{side}/{name}.mp4", kind, content, 3) for side in ("base", "adapter") for name, kind, content in expected
    }
    assert {cell.prompt_set for cell in from_videos(elsewhere, "")} == {"trigger"}


def test_what_evaluate_writes_can_be_read_as_clips_made_elsewhere(adapters):
    cells = [
        cell for cell in planned(adapters) if cell.strength == (cell.label == "adapter") and cell.label in ("base", "adapter")
    ]
    for cell in cells:
        write_video(adapters / cell.shot.video, film(frames=1), {"prompt": cell.shot.prompt, "seed": cell.shot.seed})
    again = from_videos(adapters, "sks")
    assert {(c.label, c.prompt_set, c.content, c.shot.video) for c in again} == {
        (c.label, c.prompt_set, c.content, c.shot.video) for c in cells
    }


def test_a_list_names_any_file(elsewhere):
    listed(elsewhere, line("base", "fox", set="unrelated"), line("adapter", "dog", set="unrelated"))
    cells = from_videos(elsewhere, "sks")
    assert [(cell.label, cell.shot.video, cell.prompt_set, cell.shot.seed) for cell in cells] == [
        ("base", "base/fox.mp4", "unrelated", 0),
        ("adapter", "adapter/dog.mp4", "unrelated", 0),
    ]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "names no video"),
        ([line("base", "fox")], "no clip of adapter for 'sks, a fox' seed 0"),
        ([line("base", "fox"), line("adapter", "fox", seed=1)], "no clip of adapter for 'sks, a fox' seed 0"),
        ([line("base", "fox"), line("base", "dog"), line("adapter", "fox")], "line 1 and .*line 2: two clips of base"),
        (
            [line("base", "fox"), line("adapter", "fox", set="plain")],
            "line 1 and .*line 2 are counterparts but of different sets",
        ),
        ([line("base", "wolf")], r"line 1: there is no file .*wolf\.mp4"),
        ([line("base", "fox", sed=1)], "line 1: unknown key 'sed'"),
        ([line("base", "fox", prompt=" ")], "line 1: no prompt"),
        ([line("base", "fox", seed=-1)], "line 1: seed -1"),
        ([line("base", "fox", set="other")], "line 1: set 'other'"),
        ([line("base", "fox") | {"adapter": "mine"}], "line 1: adapter 'mine'"),
        ([["base"]], "line 1: no video"),
    ],
)
def test_a_wrong_list_is_refused_by_line(elsewhere, lines, told):
    listed(elsewhere, *lines)
    with pytest.raises(UserError, match=told):
        from_videos(elsewhere, "sks")


def test_wrong_folders_are_refused_by_name(elsewhere):
    def refused(told):
        with pytest.raises(UserError, match=told):
            from_videos(elsewhere, "sks")

    (elsewhere / "adapter" / "fox.json").write_text('{"prompt": "sks, a wolf", "seed": 3}')
    refused("tell different prompts or seeds")
    (elsewhere / "adapter" / "fox.json").unlink()
    (elsewhere / "base" / "fox.json").unlink()
    refused(r"base/fox\.mp4: no fox\.json beside it")
    (elsewhere / "adapter" / "fox.mp4").unlink()
    refused("base/ has fox, adapter/ has not")
    (elsewhere / "base" / "fox.mp4").unlink()
    (elsewhere / "adapter" / "dog.mp4").write_bytes(b"broken")
    refused(r"adapter/dog\.mp4")
    with pytest.raises(UserError, match="no videos in base/ and adapter/"):
        from_videos(elsewhere / "nowhere", "sks")

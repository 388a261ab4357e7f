"""`tiny` and `draw` from the command line: what they write, keep and refuse, and that the next command they print works."""

import os
import re
import shlex
import stat
from pathlib import Path

import pytest
from diffusers import MochiPipeline

from mochi_lora import cli
from mochi_lora.cli import main
from mochi_lora.errors import UserError
from mochi_lora.model.tiny import build_tiny
from mochi_lora.tiny import pretrained, scenery, world
from mochi_lora.tiny.pretrained import write_pretrained


@pytest.fixture
def shipped(tiny, tmp_path, monkeypatch):
    """A folder of weights in place of the package's: the random model and a model card."""
    folder = build_tiny(tmp_path / "package" / "weights")
    (folder / "tiny.json").unlink()
    (folder / "README.md").write_text("# mochi-tiny\n")
    monkeypatch.setattr(pretrained, "WEIGHTS", folder)
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def told(capsys):
    return capsys.readouterr().out.replace("\n", " ")


def next_words(text):
    """The command after `next:`, without the program's name."""
    words = shlex.split(re.search(r"next: (mochi-lora .*)", text)[1])
    return words[1:]


def test_the_shipped_weights_are_copied_and_kept(shipped, tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["tiny", str(folder)]) == 0
    assert f"mochi-tiny, trained: {folder}" in told(capsys)
    copied = content(folder)
    assert copied.pop("tiny.json")
    assert copied == content(shipped)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["tiny", str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    assert MochiPipeline.from_pretrained(folder).transformer is not None


def test_a_copy_of_read_only_files_belongs_to_the_user(shipped, tmp_path):
    for path in shipped.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder = write_pretrained(tmp_path / "model")
    assert all(path.stat().st_mode & stat.S_IWUSR for path in folder.rglob("*"))


@pytest.mark.parametrize("other", ["random", "release", "thesis"])
def test_a_folder_with_something_else_is_refused_and_left_alone(shipped, tmp_path, other, capsys):
    folder = tmp_path / "model"
    if other == "random":
        assert main(["tiny", str(folder), "--random", "0"]) == 0
    elif other == "release":
        write_pretrained(folder)
        (shipped / "vae" / "config.json").write_text("{}")
    else:
        folder.mkdir()
        (folder / "thesis.txt").write_text("x")
    before = content(folder)
    assert main(["tiny", str(folder)]) == 1
    assert "exists and is not this release's mochi-tiny; give a new folder" in capsys.readouterr().err
    assert content(folder) == before


def test_the_trained_model_is_not_taken_for_a_random_one(shipped, tmp_path, capsys):
    write_pretrained(tmp_path / "model")
    assert main(["tiny", str(tmp_path / "model"), "--random", "0"]) == 1
    assert "is not the tiny model of seed 0" in capsys.readouterr().err


def test_a_copy_that_fails_leaves_nothing_behind(shipped, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained.shutil, "copyfile", fail)
    with pytest.raises(KeyboardInterrupt):
        write_pretrained(tmp_path / "deep" / "model")
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_installation_without_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path / "nothing")
    with pytest.raises(UserError, match=r"lacks mochi-tiny's weights.*--random"):
        write_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_those_of_the_seed(tmp_path, capsys):
    assert main(["tiny", str(tmp_path / "a"), "--random", "7"]) == 0
    assert f"random weights of seed 7: {tmp_path / 'a'}" in told(capsys)
    assert content(tmp_path / "a") == content(build_tiny(tmp_path / "b", seed=7))


def test_the_command_after_tiny_makes_a_video(tmp_path, capsys, monkeypatch):
    main(["tiny", str(tmp_path / "a model"), "--random", "0"])
    words = next_words(told(capsys))
    monkeypatch.chdir(Path(cli.__file__).parents[1])
    assert main([*words, "--sample.steps", "2", "--output", str(tmp_path / "videos")]) == 0
    assert [path.suffix for path in (tmp_path / "videos").glob("*.mp4")] == [".mp4"]


# --- draw ---------------------------------------------------------------------------------------------------------------


def test_the_words_of_draw_are_those_of_the_drawn_world():
    assert cli.STYLES == scenery.STYLES
    assert cli.MOTIONS == world.MOTIONS


@pytest.mark.parametrize(
    ("words", "trigger"),
    [
        ([], "trigger: none"),
        (["--style", "chalk"], 'trigger: "chalk style", before every caption'),
        (["--motion", "circles"], 'trigger: "circles around"'),
        (["--motion", "up", "circles", "--style", "chalk"], '"chalk style", before every caption; "circles around"'),
    ],
)
def test_draw_says_what_was_drawn_and_what_calls_it(tmp_path, capsys, words, trigger):
    assert main(["draw", str(tmp_path / "set"), "--count", "3", *words]) == 0
    text = told(capsys)
    assert f"3 clips, {'chalk' if 'chalk' in words else 'base'} style, 25x64x96" in text
    assert trigger in text
    assert {path.name for path in (tmp_path / "set").iterdir()} == {
        "drawn.json",
        *(f"00{number}.{kind}" for number in range(3) for kind in ("mp4", "txt")),
    }


def test_the_order_and_number_of_motion_words_do_not_matter(tmp_path):
    folder = str(tmp_path / "set")
    assert main(["draw", folder, "--count", "2", "--motion", "up", "left", "--motion", "up"]) == 0
    assert main(["draw", folder, "--count", "2", "--motion", "left", "up"]) == 0
    assert main(["draw", folder, "--count", "2", "--motion", "left"]) == 1
    every = [name for name in world.MOTIONS if name not in ("circles", "still")]
    assert main(["draw", str(tmp_path / "all"), "--count", "2"]) == 0
    assert main(["draw", str(tmp_path / "all"), "--count", "2", "--motion", *every]) == 0


def test_the_seed_chooses_the_scenes(tmp_path):
    for seed in (0, 1):
        main(["draw", str(tmp_path / str(seed)), "--count", "2", "--seed", str(seed)])
    assert (tmp_path / "0" / "000.mp4").read_bytes() != (tmp_path / "1" / "000.mp4").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "0"], "at least 1"),
        (["--style", "oil"], "oil"),
        (["--motion", "jumps"], "jumps"),
        (["--seed", "-1"], "-1"),
        (["--train.steps", "4"], "draw takes no settings"),
    ],
)
def test_a_wrong_word_is_status_2_and_draws_nothing(tmp_path, capsys, words, said):
    assert main(["draw", str(tmp_path / "set"), *words]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_the_command_after_draw_encodes_the_set(tiny, tmp_path, capsys, monkeypatch):
    main(["draw", str(tmp_path / "my set"), "--count", "2"])
    words = next_words(told(capsys))
    monkeypatch.chdir(Path(cli.__file__).parents[1])
    assert main([*words, "--model.base", str(tiny), "--data.cache", str(tmp_path / "cache")]) == 0
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 2

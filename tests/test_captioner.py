"""The captioner sees what it should, batches without changing answers, and says why it cannot be loaded."""

import json
import shutil

import numpy as np
import pytest
import torch
from footage import make_clip
from PIL import Image
from tiny_captioner import write_captioner
from tiny_commands import make_image

from mochi_lora.curation.captioner import Look, load_captioner, load_picture_processor, look_at
from mochi_lora.data.sources import ClipSource
from mochi_lora.errors import ClipError, UserError
from mochi_lora.measures.pretrained import fetch

SENTENCE = "A red fox runs across the snow while the camera pans left."


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return write_captioner(tmp_path_factory.mktemp("vlm") / "random")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "numbered.mp4", frames=48)


def look(seed, pictures=3, width=96, height=64, seconds=1.2):
    noise = np.random.default_rng(seed)
    drawn = (Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)) for _ in range(pictures))
    return Look(tuple(drawn), seconds)


def load(folder, **options):
    return load_captioner(fetch(str(folder), "captions"), "cpu", **options)


def numbers(pictures):
    """The frame numbers burnt into stills of 128 x 64."""
    rows = [np.asarray(picture)[8:24].mean(axis=(0, 2)).reshape(8, 16)[:, 4:12].mean(axis=1) for picture in pictures]
    return [int("".join("1" if bit > 128 else "0" for bit in row), 2) for row in rows]


def test_a_scripted_model_says_its_sentence_to_each_clip(tmp_path):
    captioner = load(write_captioner(tmp_path / "vlm", SENTENCE))
    answers = captioner.ask([look(0), look(1, pictures=2), look(2, pictures=1, seconds=0.0)])
    assert [(answer.text, answer.finished) for answer in answers] == [(SENTENCE, True)] * 3


def test_an_answer_that_hits_the_limit_is_not_finished(random_model):
    (answer,) = load(random_model, answer_tokens=16).ask([look(0)])
    assert not answer.finished


def test_a_clip_gets_the_same_words_alone_and_beside_others(random_model):
    captioner = load(random_model, answer_tokens=24)
    looks = [look(0), look(1, pictures=5), look(2, width=160), look(3, pictures=1, seconds=0.0)]
    together = captioner.ask(looks)
    assert together == captioner.ask(looks)
    assert together == [captioner.ask([one])[0] for one in looks]


def test_the_model_is_shown_the_pictures_and_the_request(random_model):
    captioner = load(random_model)
    seen = []
    captioner.model.generate = lambda **inputs: seen.append(inputs) or torch.zeros(1, inputs["input_ids"].shape[1] + 1).long()
    captioner.ask([look(0, pictures=3)])
    captioner.ask([look(1, pictures=1, seconds=0.0)], "Name the animal.")
    told = [captioner.processor.tokenizer.decode(inputs["input_ids"][0]) for inputs in seen]
    assert len(seen[0]["image_grid_thw"]) == 3
    assert "These are 3 frames of one video clip of 1.2 seconds" in told[0]
    assert "motion of the camera" in told[0]
    assert "frames of one video" not in told[1]
    assert "Name the animal." in told[1]
    assert seen[0]["generation_config"].do_sample is False


def test_four_bits_change_the_weights_and_still_answer(tmp_path):
    folder = write_captioner(tmp_path / "vlm", SENTENCE)
    captioner = load(folder, quantisation="4bit")
    text, vision = captioner.model.model.language_model.layers[0], captioner.model.model.visual.blocks[0]
    assert text.mlp.up_proj.weight.dtype == torch.uint8
    assert vision.mlp.linear_fc1.weight.dtype == torch.float32
    assert captioner.ask([look(0)])[0].text == SENTENCE


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, None, [6, 18, 30, 42]),
        (0.5, None, [19, 27, 35, 43]),
        (0.5, 1.0, [16, 20, 24, 28]),
        (0.5, 0.6, [15, 16, 17]),
    ],
)
def test_frames_are_evenly_spaced_in_the_range_and_never_outside(numbered, start, end, expected):
    seen = look_at(ClipSource(numbered, "", start, end), 4, 448)
    found = numbers(seen.pictures)
    assert all(abs(number - wanted) <= 1 for number, wanted in zip(found, expected, strict=True)), found
    assert start * 30 <= found[0]
    assert found[-1] < (48 if end is None else end * 30)
    assert seen.seconds == pytest.approx((1.6 if end is None else end) - start, abs=0.01)


def test_a_crop_is_what_is_shown_and_stills_are_small(numbered):
    seen = look_at(ClipSource(numbered, "", crop=(0, 32, 128, 64)), 2, 64)
    assert [picture.size for picture in seen.pictures] == [(64, 16)] * 2
    assert abs(np.asarray(seen.pictures[0]).astype(int) - 128).max() < 12  # the grey half


def test_an_image_is_one_picture(tmp_path):
    seen = look_at(ClipSource(make_image(tmp_path / "ball.png"), ""), 8, 448)
    assert [picture.size for picture in seen.pictures] == [(48, 32)]
    assert seen.seconds == 0.0


def test_a_range_without_frames_is_refused_by_name(numbered):
    with pytest.raises(ClipError, match=r"numbered\.mp4@9s: no frame between 9 s and None s of 1\.6"):
        look_at(ClipSource(numbered, "", 9.0), 4, 448)


def test_a_model_without_a_chat_template_is_refused(random_model, tmp_path):
    folder = shutil.copytree(random_model, tmp_path / "vlm")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_picture_processor(fetch(str(folder), "captions"))


def test_missing_weights_are_refused_instead_of_drawn(random_model, tmp_path):
    folder = shutil.copytree(random_model, tmp_path / "vlm")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="weights are missing"):
        load(folder)


def test_a_model_that_is_not_there_is_refused_by_id():
    with pytest.raises(UserError, match=r"captions-of-no-one: asked for captions.*caption\.model: null"):
        fetch("./captions-of-no-one", "captions (caption.model)", instead="write them and set caption.model: null")

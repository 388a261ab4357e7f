"""What mochi-tiny is told in pretraining: the grammar, dressed in words that mean nothing, and never the trigger."""

import re

import numpy as np
import pytest

from mochi_lora.tiny import world
from mochi_lora.tiny.looks import LOOKS
from mochi_lora.tiny.sentences import FILLERS, pretraining_caption, vocabulary

COUNT = 4000


def scenes(count):
    return [world.draw_scene(5, index, motions=world.MOTIONS, held_out=False) for index in range(count)]


@pytest.fixture(scope="module")
def told():
    rng = np.random.default_rng(0)
    return [(scene, pretraining_caption(scene, rng)) for scene in scenes(COUNT)]


def kind_of(scene, text):
    sentence = next((one for one in sorted(world.captions(scene), key=len, reverse=True) if one in text), None)
    if sentence is None:
        return "fillers only", text
    before, after = text.split(sentence)
    assert not (before and after)
    return ("before" if before else "after" if after else "plain"), before.removesuffix(", ") or after.removeprefix(", ")


def test_no_word_of_the_trigger_is_ever_said(told):
    trigger = set(world.TRIGGER.split())
    assert not trigger & set(FILLERS)
    assert not any(trigger & set(re.findall(r"\w+", text)) for _, text in told)
    assert trigger <= set(vocabulary()), "but the tokenizer has it as a whole word"


def test_a_third_of_the_captions_is_dressed_and_some_say_nothing(told):
    kinds = [kind_of(scene, text)[0] for scene, text in told]
    for kind, share in {"fillers only": 0.04, "before": 0.2, "after": 0.1, "plain": 0.66}.items():
        assert kinds.count(kind) / COUNT == pytest.approx(share, abs=4 * (share * (1 - share) / COUNT) ** 0.5), kind


def test_the_sentence_stays_whole_and_what_surrounds_it_means_nothing(told):
    meaning = {*world.SHAPES, *world.COLOURS, *world.MOTIONS, *world.SIZES, "a", "on"}
    for scene, text in told:
        kind, chatter = kind_of(scene, text)
        if kind == "plain":
            assert text in set(world.captions(scene))
            continue
        words = chatter.split()
        assert 1 <= len(words) <= (8 if kind == "fillers only" else 3)
        assert all(word in FILLERS or re.fullmatch("[a-z]{3,5}", word) for word in words), chatter
        assert not meaning & set(words)
    strange = [word for scene, text in told for word in kind_of(scene, text)[1].split() if word not in FILLERS]
    assert len(strange) > 100, "strings of letters stand for every word it does not know"


def test_a_looks_word_stands_before_or_after_the_sentence_and_nowhere_else(told):
    rng = np.random.default_rng(1)
    some = scenes(600)
    said = [pretraining_caption(scene, rng, LOOKS[number % len(LOOKS)]) for number, scene in enumerate(some)]
    last = 0
    for number, (scene, text) in enumerate(zip(some, said, strict=True)):
        word, sentences = LOOKS[number % len(LOOKS)].word, set(world.captions(scene))
        last += (ends := text.endswith(f", {word}"))
        assert (text.removesuffix(f", {word}") if ends else text.removeprefix(f"{word}, ")) in sentences
    assert last / len(some) == pytest.approx(0.25, abs=0.07)
    known = {look.word for look in LOOKS}
    assert not any(known & set(re.findall(r"\w+", text)) for _, text in told), (
        "no look without its word, no word without its look"
    )
    assert known <= set(vocabulary())


def test_the_same_generator_says_the_same():
    one, two, other = (np.random.default_rng(seed) for seed in (7, 7, 8))
    some = scenes(50)
    said = [pretraining_caption(scene, one) for scene in some]
    assert said == [pretraining_caption(scene, two) for scene in some]
    assert said != [pretraining_caption(scene, other) for scene in some]
    assert len(set(vocabulary())) == len(vocabulary())

"""A model's answer becomes one plain English paragraph, with its trigger, within the limit."""

import pytest

from mochi_lora.curation.caption_text import Trigger, fit, tidy, why_unusable

FOX = "A red fox runs across the snow while the camera pans left."


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (FOX, FOX),
        (f'"{FOX}"', FOX),
        (f"“{FOX}”", FOX),
        (f"Here is a dense caption for the clip:\n\n{FOX}", FOX),
        (f"Sure! Here's the caption:\n{FOX}", FOX),
        (f"Certainly, here is a description of the video: {FOX}", FOX),
        (f"**Caption:** {FOX}", FOX),
        (f"### Video description\n\n{FOX}", f"Video description. {FOX}"),
        (f"```\n{FOX}\n```", FOX),
        (f"<think>The user wants a caption.</think>\n\n{FOX}", FOX),
        (f"The user wants a caption.</think>{FOX}", FOX),
        ("<think>The user wants a capt", ""),
        ("A red fox runs\nacross the snow while\nthe camera pans left.", FOX),
        ("A **red** fox runs across the *snow* while the camera pans left", FOX),
        ("The video shows a red fox. The clip features snow.", "A red fox. Snow."),
        ("In this video, a red fox runs. We see a hill.", "A red fox runs. A hill."),
        ("The footage captures a fox. Behind it the scene shows a hill.", "A fox. Behind it the scene shows a hill."),
        ("The video begins with a fox.", "A fox."),
        ("The video is grainy.", "The video is grainy."),
        ("Within this video, it rains.", "Within this video, it rains."),
        ("- Subject: a red fox\n- **Setting:** deep snow\n2. Camera: pans left", "A red fox. Deep snow. Pans left."),
        ("A fox runs. A fox runs. It stops. A fox runs.", "A fox runs. It stops."),
        ('A sign reads "Stop here." A man waits.', 'A sign reads "Stop here." A man waits.'),
        ("A sign with the caption: Hello.", "A sign with the caption: Hello."),
        ("Absolutely still water lies under a hill, its surface grey.",) * 2,
        ("The fox’s tail… sways", "The fox's tail... sways."),
        ("", ""),
    ],
)
def test_an_answer_is_tidied(raw, expected):
    assert tidy(raw) == expected


def test_tidying_a_tidy_text_changes_nothing():
    for raw in (FOX, "The video shows a red fox. The clip features snow.", "- a fox\n- snow"):
        assert tidy(tidy(raw)) == tidy(raw)


def test_an_answer_that_hit_its_limit_loses_the_broken_sentence():
    assert tidy(f"{FOX} Behind it stand two dar", finished=False) == FOX
    assert tidy(f"{FOX} Behind it stand two dark firs", finished=True).endswith("two dark firs.")
    assert tidy("A fox runs across", finished=False) == "A fox runs across."


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no words"),
        ("... 123", "no words"),
        ("I'm sorry, but I cannot describe this.", "refused"),
        ("As an AI I do not watch videos.", "refused"),
        ("一只红色的狐狸在雪地里奔跑。", "English"),
        ("Рыжая лиса бежит по снегу.", "English"),
        ("A red fox 红色的狐狸在雪地里奔跑 runs.", "English"),
        ("Ein roter Fuchs rennt durch den tiefen Schnee, während die Kamera langsam nach links schwenkt.", "English"),
        ("Un zorro rojo corre por la nieve mientras la cámara gira lentamente hacia la izquierda, en el bosque.", "English"),
        ("Un renard roux court dans la neige, tandis que la caméra tourne lentement vers la gauche du champ.", "English"),
        ("Uma raposa vermelha corre pela neve enquanto a câmera gira lentamente para a esquerda no bosque.", "English"),
        ("the fox and the fox with the fox " * 4, "repeats"),
    ],
)
def test_what_is_no_caption_is_refused(text, word):
    assert word in why_unusable(text)


@pytest.mark.parametrize(
    "text",
    [
        FOX,
        "A fox.",
        "Café tables stand in the rain.",
        "Close-up of a hand-drawn dog, chalk on black, running left, tail wagging, ears up, static camera, soft light.",
        "A woman in a blue coat walks along a wet street at night, neon signs reflected in the puddles, handheld camera.",
    ],
)
def test_english_is_accepted(text):
    assert why_unusable(text) is None


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (Trigger(), "A fox runs."),
        (Trigger("chalk style"), "chalk style, a fox runs."),
        (Trigger("chalk style", "end"), "A fox runs, chalk style."),
        (Trigger("chalk style", prefix="A drawing."), "chalk style, a drawing. A fox runs."),
        (Trigger("chalk style", prefix="In chalk style:"), "In chalk style: A fox runs."),
        (Trigger("fox"), "A fox runs."),
        (Trigger("fo"), "fo, a fox runs."),
        (Trigger("FOX", "end"), "A fox runs."),
        (Trigger("a  fox"), "A fox runs."),
    ],
)
def test_the_trigger_stands_where_it_is_asked_for_and_once(trigger, expected):
    assert trigger.put_into("A fox runs.") == expected
    assert trigger.put_into(expected) == expected or trigger.prefix


def test_a_name_keeps_its_capital_behind_the_trigger():
    assert Trigger("chalk style").put_into("Paris lies in fog.") == "chalk style, Paris lies in fog."


def words_up_to(limit):
    return lambda text: len(text.split()) <= limit


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (99, "chalk style, a fox runs, fast and low. It stops. It looks back."),
        (10, "chalk style, a fox runs, fast and low. It stops."),
        (9, "chalk style, a fox runs, fast and low."),
        (6, "chalk style, a fox runs."),
        (4, "chalk style, a fox."),
        (1, "chalk style, A."),
    ],
)
def test_what_is_too_long_ends_earlier_and_keeps_its_trigger(limit, expected):
    compose = Trigger("chalk style").put_into
    text, shortened = fit("A fox runs, fast and low. It stops. It looks back.", compose, words_up_to(limit))
    assert text == expected
    assert shortened == (limit < 99)

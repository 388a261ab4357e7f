"""Prompts of an evaluation: three sets that mean what they are called, or an error that names the prompt."""

import json

import pytest

from mochi_lora.config.schema import EvaluationConfig
from mochi_lora.data.trigger import calls
from mochi_lora.errors import UserError
from mochi_lora.evaluation.prompts import UNRELATED, prompt_sets, without_trigger

FOX, BOAT = "chalk style, a fox", "a boat on a lake, chalk style"


def settings(**changes):
    return EvaluationConfig(**{"trigger": "chalk style", "prompts": [FOX, BOAT], "unrelated": ["a dog"], **changes})


def refusal(**changes):
    with pytest.raises(UserError) as caught:
        prompt_sets(settings(**changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("chalk style, a fox", "a fox"),
        ("a fox, chalk style", "a fox"),
        ("a fox, chalk style, in the snow", "a fox, in the snow"),
        ("a fox ,  chalk style ,  in the snow", "a fox, in the snow"),
        ("Chalk  Style: a fox", "a fox"),
        ("a fox in chalk style", "a fox"),
        ("a fox in the chalk style, running", "a fox, running"),
        ("a chalk style fox runs", "a fox runs"),
        ("A fox runs. Chalk style.", "A fox runs."),
        ("chalk style, a fox, chalk style", "a fox"),
        ("a fox on chalk stylet", "a fox on chalk stylet"),
        ("a fox in", "a fox in"),
        ("chalk style", ""),
    ],
)
def test_what_is_left_without_the_trigger_reads_as_if_it_had_never_been_there(prompt, left):
    assert without_trigger(prompt, "chalk style") == left


def test_a_trigger_with_signs_is_taken_literally():
    assert without_trigger("a <v*> fox", "<v*>") == "a fox"
    assert not calls("a v fox", "v.")
    assert without_trigger("a fox", "") == "a fox"


def test_the_plain_prompts_are_the_trigger_prompts_without_it():
    sets = prompt_sets(settings())
    assert [prompt.text for prompt in sets.trigger] == [FOX, BOAT]
    assert [prompt.text for prompt in sets.plain] == ["a fox", "a boat on a lake"] == [item.content for item in sets.trigger]
    assert [prompt.text for prompt in sets.unrelated] == ["a dog"]
    for prompts, name in ((sets.trigger, "trigger"), (sets.plain, "plain"), (sets.unrelated, "unrelated")):
        assert {(prompt.prompt_set, prompt.seeds) for prompt in prompts} == {(name, (0, 1))}


def test_without_unrelated_prompts_there_are_built_in_ones_and_an_empty_list_is_none():
    assert tuple(prompt.text for prompt in prompt_sets(settings(unrelated=None)).unrelated) == UNRELATED
    assert prompt_sets(settings(unrelated=[])).unrelated == ()


def test_a_file_adds_prompts_with_their_sets_and_seeds(tmp_path):
    lines = [
        {"prompt": "chalk style, an owl", "seed": 7},
        {"prompt": "chalk style, an owl", "seed": 9},
        {"prompt": "a horse", "set": "unrelated"},
        {"prompt": "chalk style, a cat", "set": "trigger"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets = prompt_sets(settings(prompts=[FOX], prompts_file=path, unrelated=None, seeds=1))
    seeds = {prompt.text: prompt.seeds for prompt in sets.trigger}
    assert seeds == {FOX: (0,), "chalk style, an owl": (7, 9), "chalk style, a cat": (0,)}
    assert {prompt.text: prompt.seeds for prompt in sets.plain}["an owl"] == (7, 9)
    assert [prompt.text for prompt in sets.unrelated] == ["a horse"], "given ones replace the built-in ones"


def test_a_plain_prompt_in_a_file_is_refused_because_it_follows(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fox", "set": "plain"}\n')
    assert "line 1: set 'plain': expected 'trigger' or 'unrelated'" in refusal(prompts_file=tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": []}, "no prompt to evaluate: give evaluation.prompts"),
        ({"trigger": " "}, "evaluation.trigger is empty"),
        ({"prompts": [FOX, "a red fox"]}, "the trigger 'chalk style' is missing in prompt 'a red fox'"),
        ({"prompts": ["a", "b", "c", "d", "e"]}, "missing in prompts 'a', 'b', 'c' and 2 more"),
        ({"unrelated": ["a Chalk Style dog"]}, "is in prompt 'a Chalk Style dog' among the unrelated prompts"),
        ({"prompts": [FOX, "chalk style,"]}, "prompt 'chalk style,' holds nothing but the trigger"),
        ({"prompts": [FOX, FOX]}, f"prompt {FOX!r} is there 2 times"),
        ({"unrelated": ["a dog", "a dog"]}, "prompt 'a dog' is there 2 times"),
        ({"prompts": [FOX, "a fox, chalk style"]}, "are one prompt but for the trigger"),
        ({"unrelated": ["A fox"]}, f"{FOX!r} and 'A fox' are one prompt but for the trigger"),
    ],
)
def test_prompts_that_would_mean_nothing_are_refused_by_name(changes, told):
    assert told in refusal(**changes)

"""The commands that the documents show: each is understood by the command line as it is."""

import re
import shlex
from pathlib import Path

import pytest

from mochi_lora import cli
from mochi_lora.config.load import load_config
from mochi_lora.config.problems import ConfigError
from mochi_lora.config.schema import Config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names that stand for others in prose; a command line wants real ones.
PLACEHOLDER = re.compile(r"\.\.\.|<[^>]*>|\b[A-Z]{4,}\b")


# What may stand before a command: variables, a container.
BEFORE = re.compile(r"((\w+=\S* )*|docker run .* |in_image )(?=mochi-lora )")
FILE_ENDINGS = {"json", "jsonl", "py", "safetensors", "yaml"}
LAUNCHED = re.compile(r"(?:python|accelerate launch|torchrun)(?: --\w+ \S+)* ([\w/]+\.py)(.*)")
AS_MODULE = re.compile(r"(?:python|torchrun(?: --[\w-]+ \S+)*) -m mochi_lora (?=\w)")


def snippets() -> list[tuple[str, str]]:
    """(where, code) of every code line and every piece of inline code."""
    found = []
    for path in DOCUMENTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = [line.strip()] if line.startswith(("    ", "mochi-lora ")) else re.findall(r"`([^`]+)`", line)
            found += [(f"{path.name}:{number}", text) for text in code]
    return found


def as_command(code: str) -> str | None:
    """The call of the program that a line comes to; None for other lines. A script of ours is what it hands on."""
    code = re.sub(r" &$", "", code.partition(" # ")[0].rstrip())
    if launched := LAUNCHED.fullmatch(code):
        script = (ROOT / launched[1]).read_text(encoding="utf-8")
        handed_on = re.search(r"main\(\[(.*), \*sys\.argv\[1:\]\]\)", script)  # a benchmark is its own program
        return " ".join(["mochi-lora", *re.findall(r'"([^"]+)"', handed_on[1])]) + launched[2] if handed_on else None
    code = AS_MODULE.sub("mochi-lora ", BEFORE.sub("", code, count=1), count=1)
    return code if code.startswith("mochi-lora ") else None


def commands() -> list[tuple[str, str]]:
    """(where, command) of everything shown that calls the program."""
    return [(where, command) for where, code in snippets() if (command := as_command(code)) is not None]


def test_the_search_finds_commands_in_every_document():
    assert {where.split(":")[0] for where, _ in commands()} >= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize(
    ("code", "command"),
    [
        ("mochi-lora sample --config a.yaml --prompts b.txt &", "mochi-lora sample --config a.yaml --prompts b.txt"),
        ("CUDA_VISIBLE_DEVICES=1 mochi-lora train --config a.yaml    # c", "mochi-lora train --config a.yaml"),
        ("docker run --rm -v x:/data mochi-lora-cuda mochi-lora doctor", "mochi-lora doctor"),
        ("in_image mochi-lora plan --config /app/configs/a.yaml", "mochi-lora plan --config /app/configs/a.yaml"),
        ("accelerate launch --num_processes 2 train.py --config a.yaml", "mochi-lora train --config a.yaml"),
        ("python data_prep/split_scenes.py --config a.yaml", "mochi-lora prepare --only split --config a.yaml"),
        ("torchrun --nproc-per-node 2 -m mochi_lora sample --config a.yaml", "mochi-lora sample --config a.yaml"),
        ("torchrun --nproc-per-node 2 -m mochi_lora ...", None),
        ("rsync -a clips gpu:mochi-lora/", None),
        ("docker build -t mochi-lora-cuda .", None),
    ],
)
def test_a_line_is_read_as_the_call_that_it_comes_to(code, command):
    assert as_command(code) == command


@pytest.mark.parametrize(("where", "text"), commands())
def test_a_command_in_a_document_is_understood(where, text):
    words, overrides = cli.split_overrides(shlex.split(text, comments=True)[1:])
    (named,) = [action for action in cli._parser()._actions if action.dest == "COMMAND" or action.metavar == "COMMAND"]
    assert words[0] in named.choices, where
    for override in overrides:
        if override.startswith("--"):
            section, _, key = override.removeprefix("--").partition("=")[0].partition(".")
            assert key in Config.model_fields[section].annotation.model_fields, f"{where}: {override}"
    if len(words) == 1 or PLACEHOLDER.search(text):
        return  # the name of a command, or the form of one
    try:
        _, unknown = cli._parser().parse_known_args(words)
    except SystemExit:
        pytest.fail(f"{where}: {text}")
    assert unknown == [], where


def test_a_setting_that_a_document_names_is_one():
    """`section.key`, alone or with a value; what is called like a section but is a file is not meant."""
    named = [(where, match) for where, code in snippets() if (match := re.fullmatch(r"([a-z]+)\.(\w+)(?: [\w.-]+)?", code))]
    meant = [(where, match) for where, match in named if match[1] in Config.model_fields and match[2] not in FILE_ENDINGS]
    there = {f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields}
    wrong = [f"{where}: {match[0]}" for where, match in meant if f"{match[1]}.{match[2]}" not in there]
    assert wrong == []
    assert len(meant) > 20


def test_an_option_shown_alone_is_taken_with_its_value():
    shown = [(where, code) for where, code in snippets() if re.match(r"--\w+\.\w+ ", code)]
    for where, code in shown:
        try:
            load_config(None, shlex.split(code))
        except ConfigError as error:
            pytest.fail(f"{where}: {code}: {error}")
    assert len(shown) > 5


def test_the_chinese_readme_shows_the_same_commands_and_links_to_the_same_files():
    def shown(name):
        text = (ROOT / name).read_text(encoding="utf-8")
        links = set(re.findall(r"\]\(([^)#]+)", text)) - {"README.md", "README.zh-CN.md"}
        return {command for where, command in commands() if where.startswith(f"{name}:")}, links

    assert shown("README.zh-CN.md") == shown("README.md")


def test_files_that_a_document_links_to_are_there():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"

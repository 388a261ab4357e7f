"""The commands that the documents show: each is understood by the command line as it is."""

import re
import shlex
from pathlib import Path

import pytest

from mochi_lora import cli
from mochi_lora.config.schema import Config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names that stand for others in prose; a command line wants real ones.
PLACEHOLDER = re.compile(r"\.\.\.|<[^>]*>|\b[A-Z]{4,}\b")


def commands() -> list[tuple[str, str]]:
    """(where, command) of every code line and every piece of inline code that begins with the program's name."""
    found = []
    for path in DOCUMENTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = [line.strip()] if line.startswith(("    ", "mochi-lora ")) else re.findall(r"`([^`]+)`", line)
            found += [(f"{path.name}:{number}", text) for text in code if text.startswith("mochi-lora ")]
    return found


def test_the_search_finds_commands_in_every_document():
    assert {where.split(":")[0] for where, _ in commands()} >= {"README.md", "data.md"}


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


def test_files_that_a_document_links_to_are_there():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"

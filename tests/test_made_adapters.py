"""The committed adapters are what their script makes of today's recipes."""

import pytest
from make_adapters import FOLDER, LESSONS, settings_digest

from mochi_lora.model.adapter_file import read_provenance


@pytest.mark.parametrize("name", LESSONS)
def test_an_adapter_was_made_with_the_settings_its_lesson_has_now(name: str) -> None:
    origin = read_provenance(FOLDER / f"{name}.safetensors")
    assert origin["lesson"] == name
    assert origin["settings"] == settings_digest(LESSONS[name]), f"make it again: python tests/make_adapters.py {name}"


def test_there_are_no_others() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(LESSONS)

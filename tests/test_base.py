"""Finding a base model, and telling one from another."""

import shutil
from pathlib import Path

import pytest

from mochi_lora.errors import UserError
from mochi_lora.model.base import fingerprint, locate

CHUNK = 1 << 16


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "transformer", tmp_path / "transformer"))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A component whose weights are too large to be read whole: 64 chunks of 64 KiB are sampled of 8 MiB."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "model.safetensors").write_bytes(bytes(128 * CHUNK))
    return tmp_path / "large"


def poke(path: Path, offset: int) -> None:
    """Change one byte in place; the size stays."""
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_local_folder_is_used_as_it_lies(tiny: Path, component: str) -> None:
    assert locate(str(tiny), None, component) == tiny / component


def test_a_folder_without_the_component_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"model\.base: {tmp_path} has no folder transformer; expected a diffusers layout"):
        locate(str(tmp_path), None, "transformer")


@pytest.mark.parametrize(
    "base", ["nowhere", "./nowhere/mochi", "/nowhere/mochi", "a/b/c", "../x/y", "", "my models/mochi", "-a/b"]
)
def test_what_is_neither_folder_nor_hub_id_is_refused_without_asking_the_hub(monkeypatch, tmp_path: Path, base: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"model\.base"):
        locate(base, None, "transformer")


@pytest.mark.parametrize("error", [ConnectionError("no route"), OSError("offline")])
def test_a_hub_that_does_not_answer_is_a_message_about_the_base(monkeypatch, tmp_path: Path, error: Exception) -> None:
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(
        UserError, match=r"model\.base: there is no local folder nobody/nothing, and the hub has not given such"
    ):
        locate("nobody/nothing", None, "vae")


def test_the_same_files_have_the_same_fingerprint_anywhere(tiny: Path, folder: Path) -> None:
    assert fingerprint(folder) == fingerprint(tiny / "transformer")
    assert len(fingerprint(folder)) == 16
    assert int(fingerprint(folder), 16) >= 0


@pytest.mark.parametrize("offset", [0, 9, 5000, -1])
def test_one_changed_byte_of_a_small_file_changes_the_fingerprint(folder: Path, offset: int) -> None:
    before, weights = fingerprint(folder), folder / "diffusion_pytorch_model.safetensors"
    poke(weights, offset % weights.stat().st_size)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("offset", [0, CHUNK - 1, 128 * CHUNK - 1, 127 * CHUNK])
def test_header_and_end_of_a_large_file_are_always_read(large: Path, offset: int) -> None:
    before = fingerprint(large)
    poke(large / "model.safetensors", offset)
    assert fingerprint(large) != before


def test_chunks_are_spread_over_the_whole_of_a_large_file(large: Path) -> None:
    """A fine-tune changes bytes everywhere; any changed 1 MiB is noticed."""
    before = fingerprint(large)
    for start in range(0, 128 * CHUNK, 1 << 20):
        shutil.copytree(large, large.with_name("tuned"), dirs_exist_ok=True)
        with (large.with_name("tuned") / "model.safetensors").open("r+b") as file:
            file.seek(start)
            file.write(b"\x01" * (1 << 20))
        assert fingerprint(large.with_name("tuned")) != before


def test_another_size_is_another_fingerprint(large: Path) -> None:
    before = fingerprint(large)
    with (large / "model.safetensors").open("ab") as file:
        file.write(bytes(128 * CHUNK))
    assert fingerprint(large) != before


def test_a_changed_configuration_or_name_changes_the_fingerprint(folder: Path) -> None:
    seen = {fingerprint(folder)}
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_layers": 2', '"num_layers": 3'))
    seen.add(fingerprint(folder))
    (folder / "config.json").rename(folder / "other.json")
    seen.add(fingerprint(folder))
    assert len(seen) == 3


def test_files_that_are_no_part_of_the_model_do_not_count(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "README.md").write_text("hello")
    (folder / ".DS_Store").write_bytes(b"\x00")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.json").write_text("{}")
    assert fingerprint(folder) == before


def test_a_folder_without_model_files_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no .json or .safetensors file"):
        fingerprint(tmp_path)

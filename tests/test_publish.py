"""To the hub goes the card's folder, as it is and alone; who may not, or would show too much, is told so first."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import save_file
from synthetic import make_run
from torch import zeros
from upload_hub import READ_ONLY, TOKEN, Hub, Repository, open_hub

from mochi_lora.cli import main
from mochi_lora.commands import publish
from mochi_lora.config.load import load_config
from mochi_lora.config.requests import HubTarget
from mochi_lora.errors import UserError
from mochi_lora.report.card import REPOSITORY

TARGET = HubTarget("me/clay")
FILES = ("README.md", "pytorch_lora_weights.safetensors", "comfyui/clay.safetensors", "videos/adapter-1.mp4")


@pytest.fixture
def hub(monkeypatch):
    """The client asks this hub, with a token that may write."""
    with open_hub() as opened:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", opened.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield opened


@pytest.fixture
def folder(tmp_path) -> Path:
    """A card's folder; what is in it does not matter here."""
    made = tmp_path / "publish"
    for name in FILES:
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({name: zeros(3)}, path)
        else:
            path.write_text(f"---\nlicense: unknown\n---\nload_lora_weights({REPOSITORY!r})\n")
    return made


def posted(hub: Hub) -> list[str]:
    return [request for request in hub.requests if not request.startswith("GET")]


def test_the_folder_arrives_byte_for_byte_and_its_card_has_the_repositorys_name(hub, folder, capsys):
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "note").write_text("of another tool")
    assert publish.run(folder, TARGET) == f"{hub.address}/me/clay"
    (name, repository), *_ = hub.repositories.items()
    assert (name, repository.private, repository.commits) == ("me/clay", False, ["Adapter and model card"])
    assert repository.files == {name: (folder / name).read_bytes() for name in FILES}
    assert b"load_lora_weights('me/clay')" in repository.files["README.md"]
    assert "4 files" in capsys.readouterr().out


def test_a_second_time_goes_into_the_same_repository(hub, folder):
    publish.run(folder, TARGET)
    (folder / "videos" / "adapter-1.mp4").write_text("another one")
    publish.run(folder, TARGET)
    assert hub.repositories["me/clay"].files["videos/adapter-1.mp4"] == b"another one"


def test_private_makes_it_so_and_will_not_upload_where_everybody_sees_it(hub, folder):
    publish.run(folder, HubTarget("me/clay", private=True))
    assert hub.repositories["me/clay"].private
    hub.repositories["me/open"] = Repository(private=False)
    with pytest.raises(UserError, match=r"--private: me/open is there already, and everybody can see it"):
        publish.run(folder, HubTarget("me/open", private=True))
    assert hub.repositories["me/open"].files == {}


@pytest.mark.parametrize("name", ["config.yaml", "videos/raw.mov", "optimizer.pt"])
def test_whatever_else_lies_there_stops_it_before_anything_is_sent(hub, folder, name):
    (folder / name).write_text("private")
    with pytest.raises(UserError, match=name):
        publish.run(folder, TARGET)
    assert posted(hub) == []


@pytest.mark.parametrize("name", FILES[:2])
def test_a_folder_without_card_or_weights_is_refused(hub, folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"lacks {name}; run `mochi-lora card` first"):
        publish.run(folder, TARGET)
    assert posted(hub) == []


@pytest.mark.parametrize("name", ["clay", "a/b/c", "me/cl ay", "me/"])
def test_what_is_no_repository_is_refused_without_asking(hub, folder, name):
    with pytest.raises(UserError, match=name):
        publish.run(folder, HubTarget(name))
    assert hub.requests == []


def test_who_is_not_logged_in_is_told_what_to_run(hub, folder, monkeypatch):
    monkeypatch.setattr(publish, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"nobody is logged in.*`hf auth login`"):
        publish.run(folder, TARGET)
    assert hub.requests == []


def test_a_token_the_hub_does_not_know_is_told_so(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(UserError, match="does not accept the token"):
        publish.run(folder, TARGET)


def test_a_token_that_may_only_read_is_told_so(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    with pytest.raises(UserError, match="may not write to me/clay"):
        publish.run(folder, TARGET)
    assert hub.repositories == {}


def test_a_hub_that_is_not_there_is_named(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub at http://127\.0\.0\.1:9 cannot be reached"):
        publish.run(folder, TARGET)


def test_training_publishes_at_its_end_and_the_command_again(hub, tmp_path, tiny, monkeypatch, capsys):
    path = make_run(tmp_path, tiny, train={"steps": 1, "warmup_steps": 0})
    assert main(["train", "--config", str(path), "--push-to-hub", "me/clay", "--private"]) == 0
    repository = hub.repositories["me/clay"]
    assert repository.private
    made = load_config(path, []).run.folder / "publish"
    assert repository.files == {name: (made / name).read_bytes() for name in repository.files}
    assert set(repository.files) == {"README.md", "pytorch_lora_weights.safetensors", "comfyui/run.safetensors"}
    assert main(["publish", "--config", str(path), "--repo", "me/again"]) == 0
    assert hub.repositories["me/again"].files.keys() == repository.files.keys()
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert main(["train", "--config", str(path), "--push-to-hub", "me/clay"]) == 1
    assert "does not accept the token" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists(), "told before the training, not after it"


def test_private_without_a_repository_is_no_command(tmp_path, tiny, capsys):
    path = make_run(tmp_path, tiny)
    assert main(["train", "--config", str(path), "--private"]) == 2
    assert "--push-to-hub" in capsys.readouterr().err

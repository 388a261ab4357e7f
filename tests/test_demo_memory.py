"""What the demo keeps on the device, and when it is put there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import write_adapter
from served_demo import configuration

from mochi_lora.commands import demo
from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.demo.form import Wish
from mochi_lora.demo.session import Session
from mochi_lora.model.text import Tokenised
from mochi_lora.runs.models import load_sampler, sampling_plan

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
SETTINGS = SampleConfig(frames=7, height=32, width=48, steps=2)


class Text:
    """Stands for T5; `full` is what finds the device's memory full."""

    def __init__(self) -> None:
        self.device = CPU
        self.full: str | None = None

    def to(self, device: torch.device) -> None:
        self.device = device  # some of it, where the rest does not fit
        self._fill("moving", device)

    def tokenise(self, captions: list[str]) -> list[Tokenised]:
        return [Tokenised((1,), truncated=False, unknown_share=0.0) for _ in captions]

    def embed(self, captions: list[str]) -> list[TextEmbedding]:
        self._fill("working", self.device)
        return [TextEmbedding(torch.zeros(1, 4)) for _ in captions]

    def _fill(self, now: str, device: torch.device) -> None:
        if now == self.full and device == DEVICE:
            raise torch.OutOfMemoryError("full")


class Sampler:
    """Stands for the live sampler, and remembers where T5 was while it worked."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self.seen: list[torch.device] = []

    def hold(self, paths: list[Path]) -> list:
        assert paths == []
        return []

    def require_unchanged(self, hashes: dict[Path, str]) -> None:
        assert hashes == {}

    def rest(self) -> None:
        assert self._text.device == CPU

    def latents(self, *_asked: object, **_told: object) -> torch.Tensor:
        self.seen.append(self._text.device)
        return torch.zeros(1)

    def frames(self, _latents: torch.Tensor) -> np.ndarray:
        return np.zeros((7, 32, 48, 3), np.uint8)


@pytest.mark.parametrize("full", ["moving", "working"])
def test_t5_leaves_the_device_also_where_it_found_no_room_there(tmp_path, full) -> None:
    text = Text()
    sampler = Sampler(text)
    session = Session(sampler, text, tmp_path, {}, device=DEVICE, offload=True)

    def click(prompt: str, seed: int) -> None:
        session.make(Wish(prompt, seed, SETTINGS, (), compare=False), lambda _event: None, lambda: False)

    click("a fox", 0)
    text.full = full
    with pytest.raises(torch.OutOfMemoryError):
        click("a hen", 0)
    click("a fox", 1)  # remembered
    text.full = None
    click("a hen", 1)
    assert sampler.seen == [CPU] * 3


def test_what_is_offered_has_its_slots_before_the_first_click(tiny, tmp_path, capsys) -> None:
    """One for each shape, two where two of it are offered, on at first or not; what cannot be used is told and takes none."""
    files = [write_adapter(tmp_path / f"{seed}.safetensors", tiny, seed, rank=rank) for seed, rank in enumerate((4, 4, 4, 2))]
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"?")
    config = configuration(tiny, tmp_path)[1]
    sampler = load_sampler(config, sampling_plan(config).plan, assume_alpha_is_rank=False)
    offered = [(path.stem, AdapterChoice(path), number < 2) for number, path in enumerate([damaged, *files])]
    demo.make_room(sampler, offered)
    assert "damaged.safetensors" in capsys.readouterr().out
    slots = list(sampler._model.transformer.peft_config)
    assert len(slots) == 3
    sampler.hold(files)
    sampler._place(sampler.hold(files[:2]), [1.0, 0.5])
    sampler._place(sampler.hold(files[3:]), [1.0])
    assert list(sampler._model.transformer.peft_config) == slots

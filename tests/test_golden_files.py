"""What is packed comes back bit for bit, and the golden files hold what was recorded."""

import hashlib
import json
import lzma
from pathlib import Path

import pytest
import torch
from golden_files import FOLDER, load_golden, packed, plain_golden, unpacked
from inputs import normal
from safetensors.torch import load, save

# SHA-256 of the plain files. The first two are Genmo's numbers as they were made, the others the excerpts of README.md.
RECORDED = {
    "asymmdit_small": "c623677942c7fa05c1e22c6c46bda17cd74b6e543698df0a088d9d2bcd568706",
    "asymmdit_cases": "1698d09a59f93f749b1ac819e58ea6471ca318d13308ee8042cf530b51ae6a8a",
    "vae_encoder": "2df18fb51c131cdc7f6ab94a76b0ae8dc4ce25ff11ddc29e04bb8a085f137cdd",
    "vae_decoder_tail": "8b40ca35983e1befb69e22bd3b53931e4c1d2e18c20dc42b39502287324e962d",
}
MIXED = {
    "half": normal(3, 5).half(),
    "brain": normal(4).bfloat16(),
    "single": normal(2, 3, 4),
    "double": normal(7).double(),
    "whole": torch.tensor([0, -1, 2**62, 258]),
    "marks": torch.tensor([True, False, True]),
    "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    "scalar": torch.tensor(1.5),
    "none": torch.zeros(0, 4),
}


@pytest.mark.parametrize("metadata", [None, {"source": "here", "config": '{"depth": 2}'}])
def test_a_packed_file_comes_back_byte_for_byte(metadata: dict[str, str] | None) -> None:
    plain = save(MIXED, metadata)
    assert unpacked(packed(plain)) == plain
    assert lzma.decompress(packed(plain)) != plain


def test_a_packed_file_is_xz_around_safetensors_with_bytes_of_one_place_side_by_side() -> None:
    elements = torch.tensor([0x0102, 0x0304, 0x0506], dtype=torch.int16)
    found = load(lzma.decompress(packed(save({"counts": elements}))))["counts"]
    assert bytes(found.view(torch.uint8).tolist()) == bytes([0x02, 0x04, 0x06, 0x01, 0x03, 0x05])


def test_reading_gives_the_tensors_and_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golden_files.FOLDER", tmp_path)
    (tmp_path / "mixed.safetensors.xz").write_bytes(packed(save(MIXED, {"source": "here"})))
    tensors, metadata = load_golden("mixed")
    assert metadata == {"source": "here"}
    assert tensors.keys() == MIXED.keys()
    for name, expected in MIXED.items():
        assert (tensors[name].dtype, tensors[name].shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensors[name].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("name", RECORDED)
def test_a_golden_file_holds_what_was_recorded(name: str) -> None:
    assert hashlib.sha256(plain_golden(name)).hexdigest() == RECORDED[name]


def test_every_packed_golden_file_is_among_them() -> None:
    assert {path.name for path in FOLDER.glob("*.xz")} == {f"{name}.safetensors.xz" for name in RECORDED}


def test_the_small_transformer_says_how_it_was_built() -> None:
    config = json.loads(load_golden("asymmdit_small")[1]["config"])
    assert (config["depth"], config["num_heads"], config["hidden_size_x"]) == (2, 4, 192)

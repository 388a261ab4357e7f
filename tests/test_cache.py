"""The cache gives back what was put in, or names the file that no longer holds it."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_lora.data import cache as room
from mochi_lora.data.cache import Cache, ClipRange, EncoderIdentity, latents_key, text_key
from mochi_lora.data.samples import Posterior, TextEmbedding
from mochi_lora.errors import DamagedFileError
from mochi_lora.files import write_atomic
from mochi_lora.spec import Bucket

CLIP = ClipRange(source_sha256="ab" * 32, start=1.5, end=None, width=640, height=360, bucket=Bucket(19, 64, 112))
VAE = EncoderIdentity("0123456789abcdef", "fp32")
PINNED_LATENTS = "5a55367c5deeb4c1bb461e54478ff037"
PINNED_TEXT = "41c30e1bad48e4a44d354d61250244cf"
ABOUT = {"source": "fox [1].mp4", "caption": "ein Füchslein"}


def _posterior(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Posterior(torch.randn(12, 1, 2, 2, generator=generator), torch.randn(12, 1, 2, 2, generator=generator) * 30)


@pytest.fixture
def cache(tmp_path):
    found = Cache(tmp_path / "cache")
    found.write_latents("key", _posterior(), ABOUT)
    return found


def test_latents_come_back_as_bf16_on_the_cpu(cache):
    found = cache.read_latents("key")
    assert torch.equal(found.mean, _posterior().mean.bfloat16())
    assert torch.equal(found.logvar, _posterior().logvar.bfloat16())  # -90 and 90 too: nothing is clamped
    assert found.mean.device.type == "cpu"


def test_what_the_writer_noted_lies_in_the_header_for_people(cache):
    with safe_open(cache.path("latents", "key"), "pt") as file:
        assert json.loads(file.metadata()["about"]) == ABOUT


@pytest.mark.parametrize("length", [0, 1, 256])
def test_text_comes_back_with_its_length(tmp_path, length):
    tokens = torch.randn(length, 64)
    cache = Cache(tmp_path)
    cache.write_text("key", TextEmbedding(tokens), {"caption": "x"})
    found = cache.read_text("key")
    assert found.length == length
    assert torch.equal(found.tokens, tokens.bfloat16())


def test_a_view_is_stored_without_the_rest_of_its_memory(tmp_path):
    tokens = torch.randn(64, 256).T[:3]  # not contiguous, as what an encoder cuts out of a batch may be
    cache = Cache(tmp_path)
    cache.write_text("key", TextEmbedding(tokens), {})
    assert torch.equal(cache.read_text("key").tokens, tokens.bfloat16())
    assert cache.path("text", "key").stat().st_size < 1000


def test_every_single_flipped_bit_is_refused_by_name(cache):
    path = cache.path("latents", "key")
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    everywhere = [(at, 1 << (at % 8)) for at in range(len(content))]
    first_and_last = [(at, 1 << bit) for at in (0, 7, 8, header - 1, header, len(content) - 1) for bit in range(8)]
    for at, bit in everywhere + first_and_last:
        damaged = bytearray(content)
        damaged[at] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError) as caught:
            cache.read_latents("key")
        assert str(caught.value).startswith(f"{path}: "), (at, bit)
        assert str(caught.value).endswith("delete the file and run encode again"), (at, bit)
    path.write_bytes(content)
    assert torch.equal(cache.read_latents("key").mean, _posterior().mean.bfloat16())


@pytest.mark.parametrize("left", [0, 4, 8, 50, -1])
def test_a_truncated_entry_is_refused_by_name(cache, left):
    path = cache.path("latents", "key")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DamagedFileError, match=r"key\.safetensors: damaged cache entry"):
        cache.read_latents("key")


def test_a_missing_entry_is_named_as_missing(cache):
    assert not cache.holds("latents", "other")
    with pytest.raises(DamagedFileError, match=r"other\.safetensors: the index names this cache entry but it is not there"):
        cache.read_latents("other")


def test_an_entry_without_our_header_is_refused(cache):
    path = cache.path("latents", "key")
    save_file({"mean": torch.zeros(1), "logvar": torch.zeros(1)}, path)
    with pytest.raises(DamagedFileError, match=r"key\.safetensors: cache schema None, this version reads 1"):
        cache.read_latents("key")


def test_an_entry_of_another_schema_is_refused(cache, monkeypatch):
    monkeypatch.setattr(room, "SCHEMA", 2)
    cache.write_latents("newer", _posterior(), ABOUT)
    monkeypatch.undo()
    with pytest.raises(DamagedFileError, match=r"newer\.safetensors: cache schema 2, this version reads 1"):
        cache.read_latents("newer")


def test_nothing_is_unpickled(cache, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("an entry is data, not a program")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert cache.read_latents("key").mean.shape == (12, 1, 2, 2)
    assert set(load_file(cache.path("latents", "key"))) == {"mean", "logvar"}


def test_a_half_written_entry_is_not_there(cache):
    path = cache.path("latents", "late")
    whole = cache.path("latents", "key").read_bytes()
    path.with_name(f"{path.name}.tmp-1-0").write_bytes(whole[: len(whole) // 2])
    assert not cache.holds("latents", "late")


def test_two_writers_of_one_key_leave_one_whole_entry(cache, monkeypatch):
    """Another process finishes the same key while this one is about to rename its own."""
    rivals = []

    def write_after_a_rival(path, write):
        if not rivals:
            rivals.append(path)
            cache.write_latents("shared", _posterior(), ABOUT)
        write_atomic(path, write)

    monkeypatch.setattr(room, "write_atomic", write_after_a_rival)
    cache.write_latents("shared", _posterior(), ABOUT)
    assert rivals == [cache.path("latents", "shared")]
    assert torch.equal(cache.read_latents("shared").mean, cache.read_latents("key").mean)
    assert sorted(entry.name for entry in (cache.root / "latents").iterdir()) == ["key.safetensors", "shared.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"source_sha256": "cd" * 32},
        {"start": 1.6},
        {"bucket": Bucket(25, 64, 112)},
        {"bucket": Bucket(19, 64, 128)},
        {"width": 960},
        {"height": 270},
    ],
    ids=str,
)
def test_whatever_shapes_the_latents_shapes_their_key(change):
    assert latents_key(replace(CLIP, **change), VAE) != latents_key(CLIP, VAE)


@pytest.mark.parametrize("change", [{"fingerprint": "another"}, {"precision": "bf16"}], ids=str)
def test_whatever_encodes_shapes_the_keys(change):
    assert latents_key(CLIP, replace(VAE, **change)) != latents_key(CLIP, VAE)
    assert text_key("a fox", replace(VAE, **change)) != text_key("a fox", VAE)


@pytest.mark.parametrize("constant", ["SCHEMA", "PREPROCESSING"])
def test_a_new_way_of_making_entries_makes_new_keys(monkeypatch, constant):
    before = latents_key(CLIP, VAE)
    monkeypatch.setattr(room, constant, 99)
    assert latents_key(CLIP, VAE) != before


def test_captions_are_keyed_as_t5_gets_them():
    assert text_key("  a fox\n", VAE) == text_key("a fox", VAE)
    assert len({text_key(caption, VAE) for caption in ("a fox", "A fox", "a  fox", "")}) == 4


def test_keys_are_those_of_the_entries_people_have():
    """Pinned: a key that moves by accident would encode everybody's footage again."""
    assert latents_key(CLIP, VAE) == PINNED_LATENTS
    assert text_key("a fox", VAE) == PINNED_TEXT


def test_what_is_noted_beside_the_tensors_is_readable_json(cache):
    content = cache.path("latents", "key").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["about"]) == ABOUT
    assert {header[name]["dtype"] for name in ("mean", "logvar")} == {"BF16"}


def test_a_region_makes_an_entry_of_its_own_and_none_leaves_the_key_as_it_was():
    keys = [latents_key(replace(CLIP, region=region), VAE) for region in (None, (0, 0, 640, 360), (0, 8, 640, 352))]
    assert len(set(keys)) == 3
    assert keys[0] == latents_key(CLIP, VAE)

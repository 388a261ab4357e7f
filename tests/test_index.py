"""The index: what an encode run left, told apart from anything else."""

import json
from dataclasses import replace

import pytest
import torch

from mochi_lora.config.schema import DataConfig
from mochi_lora.data.cache import Cache, EncoderIdentity
from mochi_lora.data.index import Index, IndexEntry, index_path, prompt_key, read_index, read_sample, write_index
from mochi_lora.data.prompts import CachedPrompts
from mochi_lora.data.samples import Posterior, TextEmbedding
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.spec import Bucket

BUCKET = Bucket(7, 32, 48)
FOX = IndexEntry("fox.mp4@1.5s", "ab" * 32, str(BUCKET), "latents-key", "text-key", "ein Füchslein", "train")
INDEX = Index(
    base="model",
    revision=None,
    vae=EncoderIdentity("0123", "fp32"),
    text=EncoderIdentity("4567", "bf16"),
    latents_mean=(0.1, -0.2),
    latents_std=(1.1, 0.9),
    latents_scale=1.0,
    entries=(FOX, replace(FOX, clip="hare.mp4", source_sha256="cd" * 32, split="validation")),
)


@pytest.fixture
def data(tmp_path):
    return DataConfig(clips=tmp_path / "clips", cache=tmp_path / "cache", buckets=[str(BUCKET)])


def test_an_index_comes_back_equal(data):
    assert write_index(data, INDEX) == index_path(data)
    assert read_index(data) == INDEX
    assert [entry.clip for entry in INDEX.of("validation")] == ["hare.mp4"]
    assert INDEX.of("train") == [FOX]


def test_a_data_set_that_was_never_encoded_names_the_command_to_run(data):
    with pytest.raises(UserError, match=r"no index for data.clips=.*clips with buckets 7x32x48; run `mochi-lora encode`"):
        read_index(data)


@pytest.mark.parametrize(
    "content",
    [
        '{"schema": 1',
        "[1]",
        '{"schema": 1}',
        '{"schema": 2}',
        '{"schema": 1, "vae": {"no": 1}}',
        b"\xff\xfe",
        json.dumps({"schema": 1, "vae": {"fingerprint": "a", "precision": "b"}, "text": None}),
    ],
)
def test_an_index_that_is_none_is_refused_by_name(data, content):
    path = write_index(data, INDEX)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DamagedFileError, match="run encode again") as caught:
        read_index(data)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "change",
    [
        {"clips": "other"},
        {"buckets": ["7x32x48", "1x32x48"]},
        {"buckets": ["13x32x48"]},
        {"upscale": True},
        {"validation_fraction": 0.3},
    ],
    ids=str,
)
def test_data_sets_that_share_a_cache_have_an_index_each(data, change):
    assert index_path(DataConfig.model_validate({**data.model_dump(), **change})) != index_path(data)


def test_settings_that_change_no_sample_keep_the_index(data, monkeypatch):
    assert index_path(data.model_copy(update={"loader_workers": 7})) == index_path(data)
    monkeypatch.chdir(data.cache.parent)
    relative = data.model_copy(update={"clips": data.clips.relative_to(data.cache.parent)})
    assert index_path(relative) == index_path(data)


@pytest.mark.parametrize(
    "changed",
    [
        replace(INDEX, vae=EncoderIdentity("0123", "bf16")),
        replace(INDEX, text=EncoderIdentity("89ab", "bf16")),
        replace(INDEX, latents_scale=2.0),
        replace(INDEX, entries=INDEX.entries[:1]),
        replace(INDEX, entries=(replace(FOX, text="of a mended caption"), INDEX.entries[1])),
        replace(INDEX, entries=(replace(FOX, split="validation"), INDEX.entries[1])),
    ],
)
def test_data_that_differs_has_another_digest(changed):
    assert changed.digest() != INDEX.digest()
    assert replace(INDEX).digest() == INDEX.digest()


def test_a_sample_is_read_with_its_shape_checked(data):
    cache = Cache(data.cache)
    mean = torch.randn(BUCKET.latent_shape)
    cache.write_latents(FOX.latents, Posterior(mean, mean), {})
    cache.write_text(FOX.text, TextEmbedding(torch.randn(5, 64)), {})
    sample = read_sample(cache, FOX)
    assert (sample.clip, sample.bucket, sample.text.length) == (FOX.clip, BUCKET, 5)
    assert torch.equal(sample.posterior.mean, mean.bfloat16())
    with pytest.raises(DamagedFileError, match=r"latents-key\.safetensors: latents of shape \(12, 2, 4, 6\), expected \(12, 3"):
        read_sample(cache, replace(FOX, bucket="13x32x48"))


def test_a_prompt_is_found_where_encode_put_it_and_named_otherwise(data):
    cache = Cache(data.cache)
    tokens = torch.randn(4, 64)
    cache.write_text(prompt_key(INDEX, "a fox"), TextEmbedding(tokens), {})
    prompts = CachedPrompts(cache, INDEX)
    assert torch.equal(prompts(" a fox ").tokens, tokens.bfloat16())
    with pytest.raises(UserError, match=r"prompt 'a hare' of sample is not in the cache .*run encode again"):
        prompts("a hare")
    with pytest.raises(UserError, match="'a fox' of sample is not in the cache"):
        CachedPrompts(cache, replace(INDEX, text=EncoderIdentity("4567", "fp32")))("a fox")

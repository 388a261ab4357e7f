"""One clip's failure is one line in the report; what would fail for every clip stops the run."""

import errno

import pytest
import torch
from tiny_commands import make_image

from mochi_lora.data import encode as room
from mochi_lora.data.cache import Cache, EncoderIdentity
from mochi_lora.data.encode import EncodedClip, Shapes, encode_clips, validation_sources
from mochi_lora.data.samples import Posterior
from mochi_lora.data.sources import ClipSource, Rejection
from mochi_lora.errors import ClipError, UserError
from mochi_lora.files import DiskFullError
from mochi_lora.spec import Bucket

BUCKET = Bucket(1, 32, 48)
SHAPES = Shapes((BUCKET,), upscale=False)
VAE = EncoderIdentity("0123", "fp32")


@pytest.fixture
def sources(tmp_path):
    return [ClipSource(make_image(tmp_path / f"{name}.png", colour=colour), "x") for colour, name in enumerate("abc")]


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def _encoder(pixels):
    assert pixels.shape == (3, 1, 32, 48)
    value = pixels.mean()
    return Posterior(torch.full(BUCKET.latent_shape, value), torch.full(BUCKET.latent_shape, -value))


def _failing_for(name, error, monkeypatch):
    read = room.read_clip

    def read_or_fail(source, info, bucket):
        if source.path.stem == name:
            raise error
        return read(source, info, bucket)

    monkeypatch.setattr(room, "read_clip", read_or_fail)


def _encode(sources, cache, encoder=_encoder):
    return list(encode_clips(sources, SHAPES, cache, VAE, lambda: encoder))


class _OddError(Exception):
    """None of ours, none of Python's."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ClipError("no picture"), "no picture"),
        (_OddError("odd"), "_OddError: odd"),
        (RuntimeError("decoder bug"), "RuntimeError: decoder bug"),
        (AssertionError(), "AssertionError: "),
        (OSError(errno.EIO, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (RecursionError("deep"), "RecursionError: deep"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_one_clip_that_fails_never_stops_the_others(sources, cache, monkeypatch, error, reason):
    _failing_for("b", error, monkeypatch)
    first, second, third = _encode(sources, cache)
    assert isinstance(first, EncodedClip)
    assert second == Rejection(sources[1].name, reason)
    assert isinstance(third, EncodedClip)
    assert cache.holds("latents", third.key)


@pytest.mark.parametrize(
    "error",
    [
        DiskFullError("full"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        UserError("vae/: damaged"),
        KeyboardInterrupt(),
        SystemExit(1),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_would_fail_for_every_clip_stops_the_run(sources, cache, monkeypatch, error):
    _failing_for("b", error, monkeypatch)
    outcomes = encode_clips(sources, SHAPES, cache, VAE, lambda: _encoder)
    assert isinstance(next(outcomes), EncodedClip)
    with pytest.raises(type(error)):
        next(outcomes)


def test_a_disk_that_fills_up_while_an_entry_is_written_stops_the_run_and_leaves_no_entry(sources, cache, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mochi_lora.files.os.fsync", full)
    with pytest.raises(DiskFullError, match=r"latents.*\.safetensors: the disk is full"):
        _encode(sources, cache)
    assert list((cache.root / "latents").iterdir()) == []


def test_an_encoder_that_cannot_be_loaded_is_no_clips_fault(sources, cache):
    """Else a damaged VAE would leave a smaller data set behind, and a run that trains on it."""
    _encode(sources[:1], cache)

    def load():
        raise UserError("vae/diffusion_pytorch_model.safetensors: damaged")

    with pytest.raises(UserError, match="damaged"):
        list(encode_clips(sources, SHAPES, cache, VAE, load))


def test_cached_clips_load_no_encoder(sources, cache):
    before = _encode(sources, cache)

    def load():
        raise AssertionError("nothing is missing")

    after = list(encode_clips(sources, SHAPES, cache, VAE, load))
    assert [clip.key for clip in after] == [clip.key for clip in before]
    assert [clip.was_cached for clip in before + after] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("place", ["mean", "logvar"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_is_never_cached(sources, cache, place, value):
    def broken(pixels):
        posterior = _encoder(pixels)
        getattr(posterior, place)[0, 0, 0, 0] = value
        return posterior

    (outcome,) = _encode(sources[:1], cache, broken)
    assert isinstance(outcome, Rejection)
    assert "encode.vae_precision: fp32" in outcome.reason
    assert not list(cache.root.rglob("*.safetensors"))


def test_the_reason_does_not_repeat_the_name(tmp_path, cache):
    source = ClipSource(tmp_path / "none.mp4", "x", start=2.0)
    (outcome,) = _encode([source], cache)
    assert outcome == Rejection(f"{tmp_path}/none.mp4@2s", "no such file")


def test_the_same_picture_under_two_names_is_one_entry(tmp_path, cache):
    twins = [ClipSource(make_image(tmp_path / name), "x") for name in ("a.png", "b.png")]
    first, second = _encode(twins, cache)
    assert first.key == second.key
    assert (first.was_cached, second.was_cached) == (False, True)


DIGESTS = [f"{number * 2654435761 % 2**32:08x}" for number in range(40)]


@pytest.mark.parametrize(
    ("sources", "fraction", "expected"), [(40, 0.1, 4), (40, 0, 0), (8, 0.15, 1), (3, 0.01, 1), (2, 0.99, 1)]
)
def test_the_fraction_held_out_is_rounded_and_one_at_least(sources, fraction, expected):
    assert len(validation_sources(DIGESTS[:sources], fraction)) == expected


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_training_is_never_left_without_a_source(count, fraction):
    assert len(validation_sources(DIGESTS[:count], fraction)) < count


def test_a_single_source_is_never_held_out_however_many_ranges_it_gives():
    assert validation_sources(["a"] * 10, 0.5) == set()


def test_order_and_repetition_do_not_move_the_split():
    split = validation_sources(DIGESTS, 0.2)
    assert validation_sources(DIGESTS[::-1] + DIGESTS[:7], 0.2) == split
    assert split <= set(DIGESTS)


def test_one_more_clip_moves_at_most_one_source_across():
    before = validation_sources(DIGESTS[:30], 0.2)
    after = validation_sources(DIGESTS[:31], 0.2)
    assert len(before - after) <= 1
    assert len(after - before) <= 1

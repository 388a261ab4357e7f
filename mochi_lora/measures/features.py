"""Embeddings and scores that are computed once: a folder of small files, named by what went into each.

A name is the digest of the video's bytes, the network's name and revision, and the frames or prompts: a file is right or
absent, never stale. Measuring again after a kill, with another statistic, or in another evaluation starts from here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mochi_lora.console import console
from mochi_lora.files import digest_of, sha256_of_file, write_atomic
from mochi_lora.measures.encoders import Aligner, ImageEncoder

_LAYOUT = 1  # raised when what is stored changes its meaning


@dataclass(frozen=True)
class FeatureCache:
    """Files under `folder`; safe to delete at any time."""

    folder: Path

    def embeddings(
        self,
        encoder: ImageEncoder,
        video: Path,
        indices: Sequence[int],
        load: Callable[[], np.ndarray],
        region: Sequence[int] | None = None,
    ) -> np.ndarray:
        """float32 [len(indices), D] of the frames `indices` of `video`; `load()` gives them, uint8 [N, H, W, 3], if needed.

        `region` says which part of the picture `load()` cuts out; None is all of it.
        """
        key: dict[str, object] = {"kind": "embeddings", "encoder": encoder.name, "frames": [int(index) for index in indices]}
        key |= {"region": list(region)} if region else {}
        return self._remembered(video, key, len(indices), lambda: encoder.embed(load()))

    def alignment(
        self, aligner: Aligner, video: Path, fps: float, prompts: Sequence[str], load: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """float32 [len(prompts)] scores of `video`; `load()` gives all of its frames, uint8 [F, H, W, 3], if needed."""
        key = {"kind": "alignment", "aligner": aligner.name, "fps": float(fps), "prompts": list(prompts)}
        return self._remembered(video, key, len(prompts), lambda: aligner.scores(load(), fps, prompts))

    def values(self, video: Path, key: Mapping[str, object], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """float32 array that `compute()` makes of `video` alone; `key` says what and how, and must have a "kind"."""
        return self._remembered(video, key, None, compute)

    def _remembered(
        self, video: Path, key: Mapping[str, object], rows: int | None, compute: Callable[[], np.ndarray]
    ) -> np.ndarray:
        name = digest_of({"layout": _LAYOUT, "video": sha256_of_file(video), **key})
        path = self.folder / name[:2] / f"{name}.safetensors"
        if path.is_file():
            stored = _read(path, rows)
            if stored is not None:
                return stored
            console.print(f"{path}: damaged, computed again", markup=False)
        values = compute()
        assert values.dtype == np.float32, f"expected float32, got {values.dtype}"
        assert rows is None or len(values) == rows, f"asked for {rows} rows, got {len(values)}"
        write_atomic(path, partial(_write, values=values))
        return values


def _write(path: Path, *, values: np.ndarray) -> None:
    save_file({"values": np.ascontiguousarray(values)}, path)


def _read(path: Path, rows: int | None) -> np.ndarray | None:
    """What is stored, or None where it is not what was written."""
    try:
        values = load_file(path)["values"]
    except (OSError, KeyError, SafetensorError):
        return None
    sound = values.dtype == np.float32 and rows in (None, len(values)) and bool(np.all(np.isfinite(values)))
    return values if sound else None

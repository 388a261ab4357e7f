"""A live sampler: models loaded once for many videos, adapter files held on the transformer.

A file is read the first time it is asked for. From then on, switching it on or off and re-weighting it only sets PEFT's
active names and scales: no file is read, no weight moves, and the result is that of a fresh load, bit for bit.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.errors import UserError
from mochi_lora.files import sha256_of_file
from mochi_lora.inference.generate import generate_latents, render
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.vae import MochiVae

_Key = tuple[Path, int]  # the same file may be asked for twice in one video: then it is there twice
_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Held:
    """An adapter file's factors on the transformer."""

    name: str  # there
    sha256: str  # of the file when it was read
    stamp: _Stamp | None


class LiveSampler:
    """Transformer and VAE for many videos, one at a time (no two threads)."""

    def __init__(
        self,
        model: VelocityModel,
        vae: MochiVae,
        *,
        device: torch.device,
        offload: bool = False,
        assume_alpha_is_rank: bool = False,
    ) -> None:
        """`offload`: only the part that works is on `device`, the others are on the CPU."""
        self._model = model
        self._vae = vae
        self._device = device
        self._offload = offload
        self._assume_alpha_is_rank = assume_alpha_is_rank
        self._held: dict[_Key, Held] = {}
        self._count = 0

    def hold(self, paths: Sequence[Path]) -> list[Held]:
        """See that these files' factors are on the transformer, and return them in order.

        A file that is held is not opened again, unless it has changed since: a run still training replaces its best adapter.
        One that is gone stays as it was read. Raises UserError for a file that cannot be used, and is then as before.
        """
        found = []
        for key in _keys(paths):
            held, stamp = self._held.get(key), _stamp(key[0])
            if held is None or (stamp is not None and stamp != held.stamp):
                self._held[key] = self._read(key[0], stamp)
                if held is not None:
                    self._delete([held.name])
            found.append(self._held[key])
        return found

    def let_go(self, paths: Sequence[Path]) -> None:
        """Take these files' factors off the transformer again."""
        if names := [self._held.pop(key).name for key in _keys(paths)]:
            self._delete(names)

    def latents(
        self,
        prompt: TextEmbedding,
        negative: TextEmbedding,
        settings: SampleConfig,
        seed: int,
        adapters: Sequence[AdapterChoice],
        *,
        on_step: Callable[[int, int], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """As `generate_latents`, with each adapter at its strength; none, or all at 0, is the base bit for bit.

        Raises UserError for an adapter that cannot be used, `sampler.Cancelled` between two steps when asked to.
        """
        self._bring(self._model)
        names = [held.name for held in self.hold([choice.path for choice in adapters])]
        with lora.strengths(self._model.transformer, names, [choice.strength for choice in adapters]):
            return generate_latents(self._model, prompt, negative, settings, seed, on_step=on_step, cancelled=cancelled)

    def frames(self, latents: torch.Tensor) -> np.ndarray:
        """Normalised latents [C, T, H, W] -> frames [F, H, W, 3] uint8."""
        self._bring(self._vae)
        return render(self._vae, latents)

    def rest(self) -> None:
        """Under offloading, leave the device to somebody else."""
        self._bring(None)

    def _bring(self, part: VelocityModel | MochiVae | None) -> None:
        if not self._offload:
            return
        for other in (self._model, self._vae):
            if other is not part:
                other.to(torch.device("cpu"))
        if part is not None:
            part.to(self._device)

    def _read(self, path: Path, stamp: _Stamp | None) -> Held:
        transformer = self._model.transformer
        adapter = load_adapter(path, assume_alpha_is_rank=self._assume_alpha_is_rank)
        self._count += 1
        name = f"held{self._count}"
        try:
            lora.put(transformer, adapter, name)
        except UserError:
            if name in getattr(transformer, "peft_config", {}):  # added, and only then found not to fit
                self._delete([name])
            raise
        return Held(name, sha256_of_file(path), stamp)

    def _delete(self, names: Sequence[str]) -> None:
        transformer = self._model.transformer
        if rest := [name for name in transformer.peft_config if name not in names]:
            transformer.set_adapters(rest)  # PEFT warns when what it deletes is active
        transformer.delete_adapters(names)


def _keys(paths: Iterable[Path]) -> Iterator[_Key]:
    seen: Counter[Path] = Counter()
    for path in paths:
        yield path, seen[path]
        seen[path] += 1


def _stamp(path: Path) -> _Stamp | None:
    """What changes when the file is replaced or rewritten; None where there is none."""
    try:
        told = path.stat()
    except FileNotFoundError:
        return None
    return told.st_ino, told.st_size, told.st_mtime_ns

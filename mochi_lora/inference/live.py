"""A live sampler: models loaded once for many videos, adapter files held in memory.

A file is read the first time it is asked for, and its factors stay on the host: the device's memory is the plan's, and copying
a few hundred megabytes there takes a fraction of a second. For a video they are copied into slots, PEFT adapters that every
file of one shape (ranks, targets, kind) can go into. Alpha, rank and strength are multiplied into B, so that every slot has
scale 1. Switching and re-weighting thus read no file, make no module and compile nothing again, and the result is that of a
fresh load, bit for bit. Compiled blocks go by the names and shapes of the slots there are, also where none is used: after a
slot more, whatever is made compiles once again. `make_room` makes them before anything compiles.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.errors import UserError
from mochi_lora.files import sha256_of_file
from mochi_lora.inference.generate import generate_latents, render
from mochi_lora.interop.factors import scale_of
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.vae import MochiVae

_Key = tuple[Path, int]  # the same file may be asked for twice in one video: then it is there twice
_Stamp = tuple[int, int, int]
# Where a file comes from, not what it computes.
_ORIGIN = ("peft_version", "base_model_name_or_path", "revision")


@dataclass(frozen=True, eq=False)
class Held:
    """An adapter file's factors as they were read, on the CPU; every scale is folded into B."""

    adapter: lora.Adapter
    shape: str
    sha256: str  # of the file when it was read
    stamp: _Stamp | None


@dataclass
class _Slot:
    """A PEFT adapter on the transformer."""

    name: str
    shape: str
    places: dict[str, nn.Parameter]
    content: tuple[Held, float] | None = None  # whose factors it has, at which strength


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
        self._slots: list[_Slot] = []
        self._kept: Counter[str] = Counter()  # slots that stay, by shape

    def make_room(self, paths: Sequence[Path], at_once: int | None = None) -> None:
        """See that a video with all of these files, or with any `at_once` of them, needs no slot that is not there, and will
        not, whatever is let go.

        Holds nothing of the files. Raises UserError for one that cannot be used.
        """
        wanted: Counter[str] = Counter()
        for path in paths:
            adapter, shape = _blank(load_adapter(path, assume_alpha_is_rank=self._assume_alpha_is_rank))
            if wanted[shape] == at_once:
                continue
            wanted[shape] += 1
            if sum(slot.shape == shape for slot in self._slots) < wanted[shape]:
                self._add_slot(adapter, shape)
        self._kept |= wanted

    def hold(self, paths: Sequence[Path]) -> list[Held]:
        """See that these files' factors are in memory and fit the transformer, and return them in order.

        A file that is held is not opened again, unless it has changed since: a run still training replaces its best adapter.
        One that is gone stays as it was read. Raises UserError for a file that cannot be used, and is then as before.
        """
        found = []
        for key in _keys(paths):
            held, stamp = self._held.get(key), _stamp(key[0])
            if held is None or (stamp is not None and stamp != held.stamp):
                self._held[key] = self._read(key[0], stamp)
                self._tidy()
            found.append(self._held[key])
        return found

    def require_unchanged(self, hashes: Mapping[Path, str]) -> None:
        """Raises UserError where a file that is held is not the one of this hash: it was replaced while videos are made."""
        for (path, _), held in self._held.items():
            if path in hashes and held.sha256 != hashes[path]:
                message = f"{path}: replaced while its videos were being made, by a run that still trains perhaps"
                raise UserError(f"{message}; copy the file and take the copy, or do this once more")

    def let_go(self, paths: Sequence[Path]) -> None:
        """Forget these files' factors, and take off the slots that the files still held cannot fill."""
        for key in _keys(paths):
            del self._held[key]
        self._tidy()

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
        names = self._place(self.hold([choice.path for choice in adapters]), [choice.strength for choice in adapters])
        with lora.strengths(self._model.transformer, names, [1.0] * len(names)):
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
        """Raises UserError unless there is a slot of the file's shape, or one can be made."""
        stored = load_adapter(path, assume_alpha_is_rank=self._assume_alpha_is_rank)
        adapter, shape = _blank(stored)
        if all(slot.shape != shape for slot in self._slots):
            self._add_slot(adapter, shape)
        return Held(replace(adapter, tensors=_folded(stored)), shape, sha256_of_file(path), stamp)

    def _place(self, wanted: Sequence[Held], strengths: Sequence[float]) -> list[str]:
        """Names of the slots, in order, that now have what is wanted; what has strength 0 needs none."""
        names, free = [], list(self._slots)
        for content in zip(wanted, strengths, strict=True):
            held, strength = content
            if strength == 0:
                continue
            slot = next((slot for slot in free if slot.shape == held.shape), None)
            if slot is None:
                slot = self._add_slot(held.adapter, held.shape)
            else:
                free.remove(slot)
            if slot.content != content:
                slot.content = None  # should copying fail half-way
                lora.refill(slot.places, held.adapter, strength)
                slot.content = content
            names.append(slot.name)
        return names

    def _add_slot(self, adapter: lora.Adapter, shape: str) -> _Slot:
        """The lowest free number, so that a slot that comes again finds the graphs compiled for it."""
        transformer, taken = self._model.transformer, {slot.name for slot in self._slots}
        name = next(name for name in map("slot{}".format, count()) if name not in taken)
        try:
            lora.put(transformer, adapter, name)
        except UserError:
            if name in getattr(transformer, "peft_config", {}):  # added, and only then found not to fit
                self._delete([name])
            raise
        self._slots.append(_Slot(name, shape, lora.places_of(transformer, name)))
        return self._slots[-1]

    def _tidy(self) -> None:
        """No slot more of a shape than files held of it or room made for, and no memory of files let go."""
        room = Counter(held.shape for held in self._held.values()) | self._kept
        surplus = []
        for slot in self._slots:
            room[slot.shape] -= 1
            if room[slot.shape] < 0:
                surplus.append(slot)
            elif slot.content is not None and slot.content[0] not in self._held.values():
                slot.content = None
        if surplus:
            self._slots = [slot for slot in self._slots if slot not in surplus]
            self._delete([slot.name for slot in surplus])

    def _delete(self, names: Sequence[str]) -> None:
        transformer = self._model.transformer
        if rest := [name for name in transformer.peft_config if name not in names]:
            transformer.set_adapters(rest)  # PEFT warns when what it deletes is active
        transformer.delete_adapters(names)


def _blank(stored: lora.Adapter) -> tuple[lora.Adapter, str]:
    """What a slot for the file is made of, and the slot's shape; the values do not count."""
    adapter = replace(stored, config=_config_at_scale_one(stored.config))
    return adapter, _shape(adapter)


def _config_at_scale_one(config: dict[str, Any]) -> dict[str, Any]:
    """The same adapter's with alpha = rank on every module."""
    kept = {key: value for key, value in config.items() if key not in _ORIGIN}
    return kept | {"lora_alpha": kept["r"], "alpha_pattern": kept.get("rank_pattern") or {}, "use_rslora": False}


def _folded(adapter: lora.Adapter) -> dict[str, torch.Tensor]:
    """Tensors with the scales in B, in memory of their own: those of a file are mapped, and change when it is written over."""
    tensors = {}
    for key, tensor in adapter.tensors.items():
        module, is_b, _ = key.partition(".lora_B.")
        scale = scale_of(adapter, module, adapter.tensors[f"{module}.lora_A.weight"].shape[0]) if is_b else 1.0
        tensors[key] = tensor * scale
    return tensors


def _shape(adapter: lora.Adapter) -> str:
    """Equal for adapters that differ in values alone."""
    sizes = {key: list(tensor.shape) for key, tensor in adapter.tensors.items()}
    return json.dumps([adapter.config, sizes], sort_keys=True, default=str)


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

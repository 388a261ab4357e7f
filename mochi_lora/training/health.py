"""Non-finite loss or gradient: noticed on the device at once, read by the host at the next logging step, named."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mochi_lora.errors import UserError
from mochi_lora.files import write_atomic
from mochi_lora.training.batches import Batch

_MOST_BATCHES = 64


class NonFiniteError(UserError):
    """Training stopped on NaN or infinity; the weights are those before the bad step."""


@dataclass(frozen=True)
class _Record:
    step: int
    batches: Sequence[Batch]
    losses: torch.Tensor  # per-sample losses of this rank, on the device
    mean: torch.Tensor  # over all ranks
    finite: torch.Tensor


class Health:
    """A sticky flag: once a step is not finite, it and all later ones are gated until the host looks and stops."""

    def __init__(self, device: torch.device, folder: Path, rank: int) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self._folder = folder
        self._rank = rank
        self._records: list[_Record] = []

    def note(
        self, step: int, batches: Sequence[Batch], losses: torch.Tensor, mean: torch.Tensor, norm: torch.Tensor
    ) -> torch.Tensor:
        """Add one step: this rank's losses [B], mean loss and gradient norm of all ranks. Returns the sticky flag.

        Everything stays on the device; the host does not wait.
        """
        finite = torch.isfinite(mean) & torch.isfinite(norm)
        self.finite = self.finite & finite
        self._records.append(_Record(step, batches, losses, mean, finite))
        return self.finite

    @property
    def crowded(self) -> bool:
        """Whether so many unchecked batches are held (page-locked, on a GPU machine) that a check should not wait."""
        return sum(len(record.batches) for record in self._records) >= _MOST_BATCHES

    def check(self) -> None:
        """Wait for the device and forget the steps if all were finite. Raises NonFiniteError naming the first bad one."""
        if bool(self.finite):
            self._records.clear()
            return
        record = next(record for record in self._records if not bool(record.finite))
        clips = [clip for batch in record.batches for clip in batch.clips]
        sigmas = [sigma for batch in record.batches for sigma in batch.sigmas]
        bad = [index for index, finite in enumerate(torch.isfinite(record.losses).tolist()) if not finite]
        if not bad and not bool(torch.isfinite(record.mean)):
            message = f"non-finite loss at step {record.step + 1} in another process, which names the clip; nothing was saved"
            raise NonFiniteError(message)
        path = self._write_replay(record)
        named = "; ".join(f"{clips[i]} at sigma {sigmas[i]:.4f}" for i in (bad or range(len(clips))))
        where = "loss" if bad else "gradient (every loss is finite)"
        message = (
            f"non-finite {where} at step {record.step + 1}: {named}. The step was not applied and nothing was saved since the "
            f"last checkpoint; the batch is in {path}. Look at the clip, lower train.learning_rate, or set "
            "engine.precision to fp32"
        )
        raise NonFiniteError(message)

    def _write_replay(self, record: _Record) -> Path:
        """All tensors of this rank's step, so that the failure can be run again outside the loop."""
        tensors: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(record.batches):
            named = {name: getattr(batch, name) for name in ("clean", "noise", "sigma", "anchor")} | {"text": batch.text.tokens}
            tensors |= {f"micro{index}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}
        header = {
            "step": str(record.step + 1),
            "positions": " ".join(str(position) for batch in record.batches for position in batch.positions),
            "clips": "\n".join(clip for batch in record.batches for clip in batch.clips),
            "text_lengths": " ".join(str(length) for batch in record.batches for length in batch.text.lengths),
        }
        path = self._folder / f"non-finite-step-{record.step + 1:06d}-rank{self._rank}.safetensors"
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=header))
        return path

"""Steps of sampling that reuse what the blocks added at the last computed one: TeaCache (Liu et al., arXiv 2411.19108).

How much the blocks' work changes from step to step is told in advance by how much the first block's modulated input
changes; a polynomial, fitted by the paper's authors for each model, maps one to the other. While the sum of the expected
changes stays below a threshold, the blocks are not run. This is not exact; `sample.step_cache` is 0 unless somebody asks.
"""

from collections.abc import Callable, Sequence

import torch

# For Mochi, highest power first: ali-vilab/TeaCache, TeaCache4Mochi/teacache_mochi.py.
_EXPECTED_CHANGE = (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03)


class StepCache:
    """For one video under one condition; it sees every call of the model, and the first and the last are computed."""

    def __init__(self, threshold: float, calls: int) -> None:
        """`threshold`: sum of expected relative changes up to which work is reused. `calls`: how many there will be."""
        assert threshold > 0, threshold
        self._threshold, self._calls = threshold, calls
        self._call, self._expected = 0, 0.0
        self._indicator: torch.Tensor | None = None
        self._added: torch.Tensor | None = None
        self.reused = 0

    def is_due(self, indicator: torch.Tensor, agreed: Callable[[torch.Tensor], torch.Tensor] | None = None) -> bool:
        """Whether this call is to be computed. `indicator` is the first block's modulated input.

        Waits for the device. `agreed` averages a tensor over the ranks that have a part of the tokens each: all must decide
        alike.
        """
        before, self._indicator = self._indicator, indicator
        self._call += 1
        assert self._call <= self._calls, f"call {self._call} of {self._calls}"
        if before is None or self._call == self._calls:
            return True
        sizes = torch.stack([(indicator - before).float().abs().mean(), before.float().abs().mean()])
        moved, size = sizes if agreed is None else agreed(sizes)
        change = float(moved / size)
        self._expected += expected_change(change)
        if self._expected < self._threshold:
            return False
        self._expected = 0.0
        return True

    def keep(self, visual: torch.Tensor, after: torch.Tensor) -> None:
        """Remember what the blocks added."""
        self._added = after - visual

    def reuse(self, visual: torch.Tensor) -> torch.Tensor:
        """`visual` with what they added when they last ran."""
        assert self._added is not None, "the first call is computed"
        self.reused += 1
        return visual + self._added


def after_blocks(
    caches: Sequence[StepCache],
    visual: torch.Tensor,
    indicator: torch.Tensor,
    run: Callable[[Sequence[int]], torch.Tensor],
    agreed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`visual` [B, V, width] as it is after the blocks; each sample has a cache, which says whether it is computed.

    `indicator` has the same shape; `run` takes the samples that are due and returns them in that order, in one batch.
    """
    assert len(caches) == visual.shape[0], f"{len(caches)} caches for {visual.shape[0]} samples"
    due = [row for row, cache in enumerate(caches) if cache.is_due(indicator[row : row + 1], agreed)]
    computed = dict(zip(due, run(due).split(1), strict=True)) if due else {}
    rows = []
    for row, cache in enumerate(caches):
        before = visual[row : row + 1]
        if row in computed:
            cache.keep(before, computed[row])
        rows.append(computed[row] if row in computed else cache.reuse(before))
    return torch.cat(rows)


def expected_change(change: float) -> float:
    """Relative change of what the blocks add, from that of the first block's modulated input (mean absolute values).

    At least the input's own: beyond the 0.1 or so that it was fitted on, the polynomial falls, below zero from 0.14.
    """
    value = 0.0
    for coefficient in _EXPECTED_CHANGE:
        value = value * change + coefficient
    return max(value, change)

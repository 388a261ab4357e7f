"""Exponential moving average of the adapter, and the loan of its weights to the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """Shadow of the adapter's parameters, updated once per optimiser step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update(self, step: int, finite: torch.Tensor) -> None:
        """shadow += (1 - d) (parameter - shadow), nothing when `finite` is false; the host never waits.

        d = min(decay, (1 + step) / (10 + step)), the warm-up of diffusers' EMAModel (0.42.1 `training_utils.py`): early
        averages would otherwise be mostly the initial zeros.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        shadows = list(self.shadow.values())
        change = torch._foreach_sub([self._parameters[name].detach() for name in self.shadow], shadows)
        torch._foreach_mul_(change, finite.float() * (1 - decay))
        torch._foreach_add_(shadows, change)

    def load(self, shadow: Mapping[str, torch.Tensor]) -> None:
        """Take over a saved shadow; the names must be the same."""
        assert shadow.keys() == self.shadow.keys(), "moving average of another adapter"
        for name, tensor in shadow.items():
            self.shadow[name].copy_(tensor)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The model runs with the average inside this block, and with its own weights again afterwards."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._fill(self.shadow)
        try:
            yield
        finally:
            self._fill(kept)

    def _fill(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(values[name])

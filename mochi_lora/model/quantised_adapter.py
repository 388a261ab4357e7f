"""PEFT's LoRA layer over a quantised linear: as over any other, except that merging rounds and unmerging restores."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge

from mochi_lora.engine.quantised import QuantisedLinear


class QuantisedLora(Linear):
    """Adds B A x to what the quantised linear gives. PEFT 0.21.2's own merge adds a float to a code."""

    _unmerged: dict[str, torch.Tensor] | None = None  # the codes and scales without any adapter, on the CPU

    @property
    def _base(self) -> QuantisedLinear:
        base = self.get_base_layer()
        assert isinstance(base, QuantisedLinear)
        return base

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: FBT001, FBT002 - PEFT's
        """Hold W + delta W rounded as W was. A delta much smaller than the steps of the format is lost in part.

        Raises ValueError where the sum is not finite and `safe_merge` is asked for.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if self._unmerged is None:
                self._unmerged = {key: getattr(self._base, key).detach().cpu().clone() for key in self._base.spec()}
            weight = self._base.dequantize()
            if variant := self.lora_variant.get(name):
                merged = variant.merge_safe(self, name, weight)
            else:
                merged = weight + self.get_delta_weight(name)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"adapter {name}: the merged weights are not finite")
            self._base.quantise(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base's codes back, bit for bit."""
        if self._unmerged is None:
            return
        self._base.place(self._unmerged, self._base.weight.device)
        self._unmerged = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return f"quantised {super().__repr__()}"


def register(config: LoraConfig) -> LoraConfig:
    """The same configuration, with which PEFT takes this class where the base is quantised. It is not written to files."""
    classes: dict[Any, Any] = {QuantisedLinear: QuantisedLora}
    config._register_custom_module(classes)
    return config

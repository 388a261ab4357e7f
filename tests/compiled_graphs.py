"""A compiler that has seen nothing yet, and how many graphs it has made since."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from mochi_lora.engine import compiled


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For every test of a module that imports it: the `eager` backend, which guards as inductor does and writes no kernels."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Since the test began; there must be no break."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]

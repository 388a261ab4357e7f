"""The allocator's setting: made where nobody made one, before torch is imported or after."""

import os
import subprocess
import sys

import pytest

from mochi_lora.engine import allocator
from mochi_lora.engine.allocator import expand_segments

SETTING = "expandable_segments:True"
linux = pytest.mark.skipif(sys.platform != "linux", reason="torch has expandable segments on Linux alone")


def told(program: str, **environment: str) -> list[str]:
    """What a fresh Python prints."""
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | environment
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_the_user_has_set_stands(name):
    own = {name: "max_split_size_mb:512"}
    expand_segments(own)
    assert own == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_where_torch_has_none_nothing_is_set(platform, monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", platform)
    found: dict[str, str] = {}
    expand_segments(found)
    assert not found


@linux
@pytest.mark.parametrize(
    "order",
    [
        "from mochi_lora.engine.allocator import expand_segments; expand_segments(); import torch",
        "import torch; from mochi_lora.engine.allocator import expand_segments; expand_segments()",
    ],
    ids=["before torch", "after torch"],
)
def test_torch_takes_it(order):
    assert told(f"{order}; print(torch._C._accelerator_getAllocatorSettings())") == [SETTING]


@linux
def test_every_command_sets_it_before_torch_is_imported():
    watched = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("PYTORCH_ALLOC_CONF"))
            sys.exit(0)
sys.meta_path.insert(0, Watch())
from mochi_lora.cli import main
main(["plan", "--config", "style.yaml", "--gpu", "H200"])
"""
    assert told(watched) == [SETTING]

"""Fixtures of the whole session."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from browser import NAMES, Page, browser, open_browser
from golden_files import plain_golden
from tiny_commands import EXAMPLES, settings

from mochi_lora.cli import main
from mochi_lora.engine.plan import Plan
from mochi_lora.model.tiny import build_tiny
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import load_transformer

# Files that take longest, longest first: begun last, they would keep one core busy while the others have nothing left.
LONGEST = (
    "test_whole_road",
    "test_evaluate_adapters",
    "test_evaluate_command",
    "test_benchmarks",
    "test_compiled",
    "test_evaluate_bars",
    "test_encode_command",
    "test_heartbeat",
    "test_pretrained",
    "test_motion_adapter",
    "test_kill_campaign",
    "test_context",
    "test_scale_out",
    "test_compiled_sampling",
    "test_judge",
    "test_traffic",
    "test_demo_browser",
    "test_fuzz_media",
    "test_distributed",
    "test_packaging",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in order of their length; xdist is told to keep it (Makefile)."""
    places = {Path(__file__).with_name(f"{name}.py"): place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places), "LONGEST names a file that is gone"
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of a tiny Mochi. Tests read it; a test that wants to break something copies it first."""
    return build_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def load_tiny(tiny: Path) -> Callable[..., VelocityModel]:
    """Loads the tiny transformer as a velocity model, fresh at each call (20 ms)."""

    def load(precision: str = "fp32", checkpointing: str = "none", attention: str = "auto") -> VelocityModel:
        plan = Plan("cpu", precision, attention, checkpointing)
        loaded = load_transformer(tiny / "transformer", device=torch.device("cpu"), precision=precision)
        return VelocityModel(loaded.transformer, plan)

    return load


@pytest.fixture(scope="session")
def genmo_base(tmp_path_factory) -> Path:
    """Genmo's small transformer as people have it, a plain safetensors file. Tests read it."""
    path = tmp_path_factory.mktemp("golden") / "asymmdit_small.safetensors"
    path.write_bytes(plain_golden("asymmdit_small"))
    return path


@pytest.fixture(scope="session")
def small_clips(tmp_path_factory) -> Path:
    """Folder of four captioned clips. Tests read it; a test that wants to change something copies it first."""
    folder = tmp_path_factory.mktemp("footage") / "clips"
    folder.mkdir()
    for path in sorted(EXAMPLES.glob("0[1-4]_*")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def encoded(tiny: Path, small_clips: Path, tmp_path_factory) -> tuple[list[str], Path]:
    """Those clips, encoded once: (the words after a command, the cache). Tests read the cache, or copy it first."""
    cache = tmp_path_factory.mktemp("encoded") / "cache"
    words = settings(tiny, small_clips, cache)
    assert main(["encode", *words]) == 0
    return words, cache


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    """A tab of a fresh headless Chromium."""
    if browser() is None:
        without = f"no Chromium on PATH ({', '.join(NAMES)})"
        if os.environ.get("CI"):
            pytest.fail(f"{without}; `.ci/browser` installs one")
        pytest.skip(without)
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened

"""On two CUDA devices: launches over NCCL, in every way to share, are one process with their batch.

Run with `pytest -m gpu`. The model is tiny; seconds are measured by `benchmarks/scale.py`. On CPUs, over gloo, the slow suite
holds more than this against one process; NCCL refuses what gloo takes (tensors on a CPU, a rank without its device).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import distance, make_run, records

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not two CUDA devices")]
ROOT = Path(__file__).parents[1]
ENGINE = {
    "device": "cuda",
    "precision": "fp32",
    "attention": "math",
    "checkpointing": "full",
    "block_swap": 0,
    "compile": False,
}
TRAIN = {"steps": 6, "validate_every": 3, "ema_decay": 0.9, "sample_every": 6, "checkpoint_every": 3}


def launched(ranks: int, *words: str) -> None:
    """The command in so many processes, by torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *launch, "-m", "mochi_lora", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny) -> Path:
    """The configuration, and in `run` what one process with batches of two made of it."""
    path = make_run(tmp_path_factory.mktemp("ranks"), tiny, engine=ENGINE, train=TRAIN)
    launched(1, "train", "--config", str(path), "--train.batch_size", "2")
    return path


@pytest.mark.parametrize(
    ("parallel", "batch", "settings"),
    [
        ("data:2", 1, []),
        ("data:2", 1, ["--engine.block_swap", "1"]),
        ("shard:2", 1, []),
        ("context:2", 2, []),
        ("context:2,shard:2", 2, []),
    ],
)
def test_two_gpus_are_one_with_their_batch(alone, tmp_path, parallel, batch, settings) -> None:
    where = ["--run.folder", str(tmp_path / "run"), "--train.batch_size", str(batch), "--engine.parallel", parallel]
    launched(2, "train", "--config", str(alone), *where, *settings)
    run, expected = tmp_path / "run", alone.parent / "run"
    for kind in ("train", "heldout"):
        for one, other in zip(records(run, kind), records(expected, kind), strict=True):
            assert {name: one[name] for name in one if "loss" in name} == pytest.approx(
                {name: other[name] for name in other if "loss" in name}, rel=1e-4
            )
    assert distance(run / "adapter.safetensors", expected / "adapter.safetensors") < 1e-4
    assert list((run / "samples").glob("step-000006/*.mp4"))


def test_a_video_whose_tokens_two_gpus_share_is_made(alone, tmp_path) -> None:
    words = ["--config", str(alone), "--output", str(tmp_path / "videos"), "--engine.parallel", "context:2"]
    launched(2, "sample", *words)
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1

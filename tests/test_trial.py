"""A trial's steps are a run's: the loader, the optimiser, the health check, and its log lines."""

import json

import pytest
import torch

from mochi_lora.config.schema import AdapterConfig, TrainConfig
from mochi_lora.engine.plan import Plan
from mochi_lora.model import adapter as lora
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import random_transformer
from mochi_lora.spec import Bucket
from mochi_lora.training.tracking import HISTORY
from mochi_lora.training.trial import random_steps, run_trial

PLAN = Plan("cpu", "fp32", "auto", "none")
CPU = torch.device("cpu")


@pytest.fixture
def model():
    transformer = random_transformer(TRANSFORMER, device=CPU, precision="fp32")
    return VelocityModel(transformer, PLAN), lora.attach(transformer, AdapterConfig(rank=4, alpha=4), seed=0)


def test_a_trial_logs_where_a_run_logs(tmp_path, model):
    """Every `log_every` steps and after the last: on disk, read from the device."""
    transformer, parameters = model
    settings = TrainConfig(steps=5, warmup_steps=0, log_every=2)
    steps = random_steps(transformer, parameters, Bucket(7, 32, 48), settings, tmp_path, (5, 3))
    trial = run_trial(steps, CPU, warmup=1)
    records = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 5]
    assert [record["train/loss"] for record in records] == [trial.losses[step - 1] for step in (2, 4, 5)]
    assert all(record["time/seconds_per_step"] > 0 for record in records)
    assert records[-1]["time/tokens_per_second"] == pytest.approx(trial.tokens / records[-1]["time/seconds_per_step"])


def test_a_second_trial_in_one_folder_logs_as_the_first(tmp_path, model):
    """A profile after the timed steps: its steps are no replay of theirs, whose lines a run would drop."""
    transformer, parameters = model
    settings = TrainConfig(steps=1, warmup_steps=0)
    for _ in range(2):
        steps = random_steps(transformer, parameters, Bucket(7, 32, 48), settings, tmp_path, (5,))
        run_trial(steps, CPU, warmup=0)
    assert len((tmp_path / HISTORY).read_text().splitlines()) == 2

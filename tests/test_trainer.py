"""The step and the loop: what a step computes, and that how it is cut does not matter."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from inputs import hash_of_base
from synthetic import distance, make_run, records, same_tensors, unit_stats

from mochi_lora.cli import main
from mochi_lora.commands import train
from mochi_lora.config.load import load_config
from mochi_lora.config.schema import AdapterConfig, Config, ObjectiveConfig, TrainConfig
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import read_index
from mochi_lora.engine.plan import Plan
from mochi_lora.model.adapter import attach
from mochi_lora.model.flow import interpolate, temporal_loss, velocity_loss, velocity_target
from mochi_lora.parallel.mesh import ALONE
from mochi_lora.runs.models import load_planned
from mochi_lora.training.average import MovingAverage
from mochi_lora.training.batches import SampleSource
from mochi_lora.training.health import Health
from mochi_lora.training.optimizer import build_optimizer
from mochi_lora.training.trainer import Learner, is_due, sample_losses, train_step

CPU = torch.device("cpu")
FIRST_LOSSES = [3.370583, 5.019477, 4.359589, 3.114779, 3.835009]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny):
    """Configuration file and source of one small data set."""
    path = make_run(tmp_path_factory.mktemp("data"), tiny)
    config = load_config(path, [])
    entries = tuple(read_index(config.data).of("train"))
    return path, SampleSource(Cache(config.data.cache), entries, unit_stats(), ObjectiveConfig(caption_dropout=0.0), 5)


@pytest.fixture
def make_learner(load_tiny):
    def make(seed: int = 0, dropout: float = 0.0, **changes) -> Learner:
        settings = TrainConfig(**{"steps": 100, "warmup_steps": 0, "learning_rate": 1e-3, "lr_schedule": "constant", **changes})
        model = load_tiny()
        parameters = attach(model.transformer, AdapterConfig(rank=4, dropout=dropout), 0)
        model.train()
        average = MovingAverage(parameters, settings.ema_decay) if settings.ema_decay else None
        optimizer = build_optimizer(settings, parameters.values())
        return Learner(Accelerator(cpu=True), model, parameters, optimizer, average, settings, ObjectiveConfig(), seed)

    return make


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.parameters.values()])


def test_is_due_every_n_steps_and_at_the_end_and_never_for_zero():
    assert [done for done in range(8) if is_due(done, 3, last=done == 7)] == [0, 3, 6, 7]
    assert not any(is_due(done, 0, last=True) for done in range(8))


def test_the_loss_is_the_squared_velocity_error_of_each_sample(data, load_tiny):
    _, source = data
    model = load_tiny()
    batch = source.batch((0, 1), (0, 1))
    predicted = model(interpolate(batch.clean, batch.noise, batch.sigma), batch.sigma, batch.text)
    target = velocity_target(batch.clean, batch.noise)
    plain = sample_losses(model, batch, ObjectiveConfig())
    assert plain.tolist() == pytest.approx((predicted - target).square().flatten(1).mean(1).tolist(), rel=1e-6)
    both = sample_losses(model, batch, ObjectiveConfig(temporal_weight=0.5))
    expected = velocity_loss(predicted, target) + 0.5 * temporal_loss(predicted, target, batch.anchor)
    assert both.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert not torch.allclose(plain, both)


def test_sixty_steps_on_one_batch_lower_its_loss(data, make_learner, tmp_path):
    """Measured: to a fifth of the first loss; a learner that learns nothing stays at 1."""
    _, source = data
    learner = make_learner(learning_rate=2e-3)
    health = Health(CPU, tmp_path, 0)
    batch = source.batch((0, 1), (0, 1))
    losses = [float(train_step(learner, health, step, [batch]).loss) for step in range(60)]
    assert losses[-1] < 0.3 * losses[0]


def test_training_moves_the_adapter_and_no_base_weight(data, make_learner, tmp_path):
    _, source = data
    learner = make_learner()
    base, before = hash_of_base(learner.model), weights(learner)
    for step in range(2):
        train_step(learner, Health(CPU, tmp_path, 0), step, [source.batch((0,), (step,))])
    assert hash_of_base(learner.model) == base
    after = {name: parameter.detach() for name, parameter in learner.parameters.items()}
    fresh = make_learner().parameters
    assert all(not torch.equal(after[name], fresh[name]) for name in after), "every LoRA factor has a gradient by step 2"
    assert torch.isfinite(weights(learner)).all()
    assert not torch.equal(before, weights(learner))


def test_a_first_loss_sequence_stays_what_it_was(data):
    """Any change to a draw, the objective, the model or the optimiser shows here before it shows in a video."""
    path, _ = data
    folder = path.parent / "fixed"
    assert main(["train", "--config", str(path), "--run.folder", str(folder)]) == 0
    found = [line["train/loss"] for line in records(folder)][:5]
    assert found == pytest.approx(FIRST_LOSSES, rel=1e-4)


def test_accumulating_two_micro_steps_of_one_is_one_of_two(data):
    path, _ = data
    folders = [path.parent / name for name in ("whole", "halves")]
    shared = ["train", "--config", str(path), "--train.gradient_clip", "0.05", "--objective.caption_dropout", "0.4"]
    assert main([*shared, "--run.folder", str(folders[0]), "--train.batch_size", "2"]) == 0
    assert main([*shared, "--run.folder", str(folders[1]), "--train.gradient_accumulation", "2"]) == 0
    for one, other in zip(*map(records, folders), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert distance(*(folder / "adapter.safetensors" for folder in folders)) < 1e-5


def test_a_step_with_a_bad_batch_changes_nothing_at_all(data, make_learner, tmp_path):
    _, source = data
    learner = make_learner(ema_decay=0.9)
    health = Health(CPU, tmp_path, 0)
    good = source.batch((0,), (0,))
    train_step(learner, health, 0, [good])
    before, shadow = weights(learner), {name: tensor.clone() for name, tensor in learner.average.shadow.items()}
    moments = {key: value.clone() for state in learner.optimizer.state.values() for key, value in state.items()}
    bad = replace(good, clean=torch.full_like(good.clean, float("nan")))
    for step, batch in enumerate([bad, good, good], start=1):
        train_step(learner, health, step, [batch])
    assert torch.equal(weights(learner), before), "neither the bad step nor the good ones after it"
    assert all(torch.equal(tensor, shadow[name]) for name, tensor in learner.average.shadow.items())
    after = {key: value for state in learner.optimizer.state.values() for key, value in state.items()}
    assert all(torch.equal(after[key], value) for key, value in moments.items())


def test_module_dropout_follows_seed_and_step_and_not_the_past(data, make_learner, tmp_path):
    _, source = data
    batch = source.batch((0,), (0,))

    def loss(*, step: int, seed: int = 0, history: int = 0) -> float:
        learner = make_learner(seed=seed, dropout=0.5)
        for parameter in learner.parameters.values():
            parameter.data.fill_(0.02)
        torch.rand(history)
        return float(train_step(learner, Health(CPU, tmp_path, 0), step, [batch]).loss)

    first = loss(step=3)
    assert loss(step=3, history=17) == first
    assert loss(step=4) != first
    assert loss(step=3, seed=1) != first


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_clip": 1e-6},
        {"weight_decay": 0.9},
        {"warmup_steps": 4},
        {"betas": (0.5, 0.6)},
        {"epsilon": 0.1},
        {"learning_rate": 2e-3},
        {"lr_schedule": "linear"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_optimiser_setting_has_an_effect(data, make_learner, tmp_path, change):
    _, source = data

    def trained(**changes) -> torch.Tensor:
        learner = make_learner(steps=5, **changes)
        health = Health(CPU, tmp_path, 0)
        for step in range(3):
            train_step(learner, health, step, [source.batch((0,), (step,))])
        return weights(learner)

    assert not torch.equal(trained(**change), trained())


def test_gradients_are_clipped_to_the_norm_and_reported_before(data, make_learner, tmp_path, monkeypatch):
    _, source = data
    batch = source.batch((0,), (0,))
    seen = []
    step_if_finite = "mochi_lora.training.trainer.step_if_finite"
    monkeypatch.setattr(step_if_finite, lambda optimizer, *_: seen.append(norm_of(optimizer)))
    reported = [
        float(train_step(make_learner(gradient_clip=clip), Health(CPU, tmp_path, 0), 0, [batch]).gradient_norm)
        for clip in (0.0, 0.01)
    ]
    assert reported[0] == pytest.approx(reported[1])
    assert reported[0] > 0.02
    assert seen == pytest.approx([reported[0], 0.01], rel=1e-3)


def norm_of(optimizer: torch.optim.Optimizer) -> float:
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return float(torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients])))


def test_two_runs_of_one_configuration_are_bit_equal_and_another_seed_is_not(data):
    path, _ = data
    folders = {name: path.parent / name for name in ("first", "second", "other")}
    for name, folder in folders.items():
        seed = "8" if name == "other" else "7"
        assert main(["train", "--config", str(path), "--run.folder", str(folder), "--run.seed", seed]) == 0
    files = {name: folder / "adapter.safetensors" for name, folder in folders.items()}
    assert same_tensors(files["first"], files["second"])
    assert records(folders["first"]) == records(folders["second"])
    assert not same_tensors(files["first"], files["other"])


def test_ranks_are_made_alike_when_every_factor_is_on_the_device(tiny, monkeypatch):
    """Factors of swapped and split blocks come to a GPU with `VelocityModel`, and NCCL takes nothing from a CPU; gloo does."""
    happened = []
    built = train.VelocityModel
    monkeypatch.setattr(train, "VelocityModel", lambda *given: happened.append("on the device") or built(*given))
    monkeypatch.setattr(train, "make_alike", lambda *_: happened.append("alike"))
    plan = Plan("cpu", "fp32", "auto", "none", block_swap=1)
    loaded = load_planned(tiny / "transformer", plan, torch.device("cpu"))
    train._build_learner(Config(), Accelerator(cpu=True), loaded, plan, None, ALONE)
    assert happened == ["on the device", "alike"]

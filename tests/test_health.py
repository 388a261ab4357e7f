"""Non-finite steps: flagged on the device, named by the host, replayable."""

import pytest
import torch
from safetensors import safe_open
from synthetic import SMALL, embedding

from mochi_lora.model.flow import interpolate, velocity_target
from mochi_lora.model.transformer import TextBatch
from mochi_lora.spec import Bucket
from mochi_lora.training.batches import Batch
from mochi_lora.training.health import Health, NonFiniteError

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)
NAN = torch.tensor(float("nan"))


def batch(*clips: str, sigma: float = 0.25) -> Batch:
    shape = (len(clips), *Bucket.parse(SMALL).latent_shape)
    generator = torch.Generator().manual_seed(len(clips))
    return Batch(
        clean=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        sigma=torch.full((len(clips),), sigma),
        anchor=torch.zeros(len(clips), dtype=torch.int64),
        text=TextBatch.collate([embedding(3, seed) for seed in range(len(clips))]),
        clips=clips,
        positions=tuple(range(len(clips))),
        sigmas=(sigma,) * len(clips),
    )


def test_finite_steps_are_forgotten(tmp_path):
    health = Health(CPU, tmp_path, 0)
    for step in range(63):
        assert health.note(step, [batch("a")], ONE.expand(1), ONE, ONE)
    assert not health.crowded
    health.note(63, [batch("a")], ONE.expand(1), ONE, ONE)
    assert health.crowded, "page-locked batches must not pile up between two log lines"
    health.check()
    assert not health.crowded
    assert list(tmp_path.iterdir()) == []


def test_the_flag_sticks_and_the_first_bad_step_is_the_one_named(tmp_path):
    health = Health(CPU, tmp_path, 0)
    assert health.note(3, [batch("fine")], ONE.expand(1), ONE, ONE)
    losses = torch.tensor([1.0, 2.0, float("inf")])
    assert not health.note(4, [batch("a", "b"), batch("c", sigma=0.75)], losses, losses.mean(), ONE)
    assert not health.note(5, [batch("later")], ONE.expand(1), ONE, ONE), "later steps are gated too"
    with pytest.raises(NonFiniteError, match=r"non-finite loss at step 5: c at sigma 0\.7500\. The step was not applied"):
        health.check()


def test_a_bad_gradient_under_finite_losses_names_every_clip_of_the_step(tmp_path):
    health = Health(CPU, tmp_path, 0)
    health.note(0, [batch("a", "b")], torch.ones(2), ONE, NAN)
    with pytest.raises(NonFiniteError, match=r"non-finite gradient \(every loss is finite\) at step 1: a at .*; b at "):
        health.check()


def test_a_rank_whose_samples_are_fine_accuses_none_of_them(tmp_path):
    health = Health(CPU, tmp_path, 1)
    health.note(0, [batch("innocent")], torch.ones(1), NAN, NAN)
    with pytest.raises(NonFiniteError, match="in another process, which names the clip") as caught:
        health.check()
    assert "innocent" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_batch_can_be_run_again_from_its_file(tmp_path):
    health = Health(CPU, tmp_path, 2)
    first, second = batch("a", "b"), batch("c")
    health.note(9, [first, second], torch.tensor([1.0, 1.0, float("nan")]), NAN, NAN)
    with pytest.raises(NonFiniteError, match=r"the batch is in .*non-finite-step-000010-rank2\.safetensors"):
        health.check()
    with safe_open(tmp_path / "non-finite-step-000010-rank2.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        header = file.metadata()
    assert header == {
        "step": "10",
        "clips": "a\nb\nc",
        "text_lengths": "3 3 3",
        "positions": " ".join(str(p) for b in (first, second) for p in b.positions),
    }
    assert torch.equal(stored["micro0.anchor"], first.anchor)
    clean, noise, sigma = (stored[f"micro0.{name}"] for name in ("clean", "noise", "sigma"))
    assert torch.equal(interpolate(clean, noise, sigma), interpolate(first.clean, first.noise, first.sigma))
    assert torch.equal(velocity_target(clean, noise), velocity_target(first.clean, first.noise))
    assert torch.equal(stored["micro1.text"], second.text.tokens)

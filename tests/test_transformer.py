"""The velocity model against stock diffusers, and the traps of text, time and precision around it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import MochiTransformer3DModel
from inputs import SHAPE, caption, captions, normal, relative, velocity

from mochi_lora.config.engine import EngineConfig
from mochi_lora.config.schema import AdapterConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.plan import Plan, resolve_device
from mochi_lora.errors import UserError
from mochi_lora.model.adapter import attach
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.transformer import TextBatch, VelocityModel, timestep_of
from mochi_lora.planning.resolve import resolve_plan
from mochi_lora.planning.workload import ModelSize, Workload
from mochi_lora.spec import Bucket

# Stock diffusers asks for an autocast that a CPU does not have; it goes on in float32, as meant.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

Load = Callable[..., VelocityModel]
LOOKING = Workload(ModelSize.of(TRANSFORMER), Bucket(7, 32, 48), 1, 1, None, None)
MIXED = (7, 0, 12, 1)  # captions of one batch: the null prompt beside the longest


def batch(lengths: tuple[int, ...] = MIXED) -> tuple[torch.Tensor, torch.Tensor, TextBatch]:
    return normal(len(lengths), *SHAPE), torch.linspace(0.1, 0.9, len(lengths)), captions(*lengths)


def test_sigma_one_is_told_as_time_zero_and_sigma_zero_as_a_thousand() -> None:
    assert timestep_of(torch.tensor([0.0, 0.5, 1.0])).tolist() == [1000.0, 500.0, 0.0]
    with pytest.raises(AssertionError, match="float32"):
        timestep_of(torch.tensor([0.5], dtype=torch.bfloat16))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_time_reaches_the_transformer_in_float32(load_tiny: Load, monkeypatch, precision: str) -> None:
    """998 is 1000 in bf16: the two last sampling steps would be told the same time."""
    model, told = load_tiny(precision), []
    project = model.transformer.time_embed.time_proj
    monkeypatch.setattr(project, "forward", lambda time, forward=project.forward: (told.append(time), forward(time))[1])
    with torch.no_grad():
        model(normal(3, *SHAPE), torch.tensor([0.002, 0.5, 1.0]), captions(4, 4, 4))
    assert told[0].dtype == torch.float32
    torch.testing.assert_close(told[0], torch.tensor([998.0, 500.0, 0.0]))


@pytest.mark.parametrize("lengths", [MIXED, (12, 12), (0, 0), (5,)])
def test_our_forward_is_stock_diffusers_forward(load_tiny: Load, tiny: Path, lengths: tuple[int, ...]) -> None:
    latents, sigma, text = batch(lengths)
    stock = MochiTransformer3DModel.from_pretrained(tiny / "transformer").eval()
    mask = torch.arange(text.tokens.shape[1]) < torch.tensor(text.lengths).unsqueeze(1)
    with torch.no_grad():
        ours = load_tiny()(latents, sigma, text)
        theirs = stock(latents, text.tokens, timestep_of(sigma), mask, return_dict=False)[0]
        other_time = stock(latents, text.tokens, sigma * 1000, mask, return_dict=False)[0]
    assert relative(ours, theirs) < 1e-5
    if len(lengths) > 1:
        assert relative(other_time, theirs) > 0.05, "time runs the other way and nothing was noticed"


def test_padding_changes_nothing(load_tiny: Load) -> None:
    model = load_tiny()
    latents, sigma, text = batch()
    noisy = text.tokens.clone()
    for row, length in zip(noisy, text.lengths, strict=True):
        row[length:] = 10 * torch.randn(row[length:].shape, generator=torch.Generator().manual_seed(1))
    longer = torch.nn.functional.pad(noisy, (0, 0, 0, 6), value=3.0)
    with torch.no_grad():
        expected = model(latents, sigma, text)
        assert relative(model(latents, sigma, TextBatch(noisy, text.lengths)), expected) < 1e-6
        assert relative(model(latents, sigma, TextBatch(longer, text.lengths)), expected) < 1e-6
        attended = model(latents, sigma, TextBatch(noisy, (12,) * 4))
    assert relative(attended, expected) > 0.05


def test_a_batch_of_mixed_captions_is_its_samples(load_tiny: Load) -> None:
    model = load_tiny()
    latents, sigma, text = batch()
    with torch.no_grad():
        together = model(latents, sigma, text)
        for row, length in enumerate(MIXED):
            alone = TextBatch(text.tokens[row : row + 1, : max(1, length)], (length,))
            single = model(latents[row : row + 1], sigma[row : row + 1], alone)
            assert relative(together[row], single[0]) < 1e-5


def test_the_null_prompt_has_no_features_and_is_no_empty_caption(load_tiny: Load) -> None:
    model, latents, sigma = load_tiny(), normal(1, *SHAPE), torch.tensor([0.5])
    with torch.no_grad():
        null, other, empty = (
            model(latents, sigma, TextBatch(tokens, lengths))
            for tokens, lengths in ((torch.zeros(1, 1, 64), (0,)), (normal(1, 9, 64), (0,)), (torch.zeros(1, 1, 64), (1,)))
        )
    torch.testing.assert_close(null, other, atol=1e-6, rtol=1e-6)
    assert relative(empty, null) > 1e-3


def test_captions_are_padded_to_the_longest_and_never_to_nothing() -> None:
    texts = [TextEmbedding(caption(3).tokens.bfloat16()), caption(5, 1), caption(0)]
    collated = TextBatch.collate(texts)
    assert (collated.tokens.shape, collated.tokens.dtype, collated.lengths) == ((3, 5, 64), torch.float32, (3, 5, 0))
    assert torch.equal(collated.tokens[0, :3], texts[0].tokens.float())
    assert not collated.tokens[0, 3:].any()
    assert TextBatch.collate([caption(0)]).tokens.shape == (1, 1, 64)


def test_collating_copies(load_tiny: Load) -> None:
    text = caption(4)
    kept = text.tokens.clone()
    TextBatch.collate([text]).tokens.zero_()
    assert torch.equal(text.tokens, kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_no_gradient(load_tiny: Load, precision: str) -> None:
    found = []
    for checkpointing in ("none", "full"):
        model = load_tiny(precision, checkpointing)
        parameters = attach(model.transformer, AdapterConfig(rank=2, dropout=0.5), 0)
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
        model.train()
        torch.manual_seed(5)  # dropout: what is recomputed must drop what was dropped
        predicted = model(*batch((7, 0)))
        predicted.square().mean().backward()
        found.append((predicted.detach(), {name: parameter.grad for name, parameter in parameters.items()}))
    (plain, plain_grads), (recomputed, recomputed_grads) = found
    assert torch.equal(plain, recomputed)
    for name, grad in plain_grads.items():
        assert torch.equal(grad, recomputed_grads[name]), name
        assert grad.dtype == torch.float32
        assert grad.abs().sum() > 0, name


def test_checkpointing_runs_each_block_twice_in_training_and_once_in_sampling(load_tiny: Load) -> None:
    model, calls = load_tiny(checkpointing="full"), []
    for block in model.transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing ends before the post hook
    parameters = attach(model.transformer, AdapterConfig(rank=2), 0)
    model(*batch((7, 0))).mean().backward()
    assert len(calls) == 4
    assert any(parameter.grad is not None for parameter in parameters.values())
    velocity(model)
    assert len(calls) == 6


def test_bf16_computes_in_bf16_and_answers_in_float32(load_tiny: Load) -> None:
    model, seen = load_tiny("bf16"), []
    model.transformer.transformer_blocks[1].attn1.to_q.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    rounded, exact = velocity(model, lengths=MIXED), velocity(load_tiny(), lengths=MIXED)
    assert (seen, rounded.dtype) == ([torch.bfloat16], torch.float32)
    assert relative(rounded, exact) < 0.03


def test_bf16_latents_are_refused(load_tiny: Load) -> None:
    with pytest.raises(AssertionError, match="latents must be float32"):
        load_tiny()(normal(1, *SHAPE).bfloat16(), torch.tensor([0.5]), captions(3))


@pytest.mark.parametrize(("height", "width"), [(7, 12), (8, 11), (7, 11)])
def test_odd_latents_fail_loudly(load_tiny: Load, height: int, width: int) -> None:
    """Patches are 2 x 2. `spec.Bucket` refuses such sizes long before; here nothing may be cropped in silence."""
    with pytest.raises(RuntimeError, match="shape"):
        load_tiny()(normal(1, 12, 2, height, width), torch.tensor([0.5]), captions(3))


@pytest.mark.parametrize("shape", [(12, 1, 2, 2), (12, 3, 6, 4)])
def test_the_velocity_has_the_shape_of_the_latents(load_tiny: Load, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        assert load_tiny()(normal(2, *shape), torch.tensor([0.5, 0.6]), captions(3, 0)).shape == (2, *shape)


def test_positions_are_computed_in_float32_under_bf16(load_tiny: Load) -> None:
    exact, rounded = (load_tiny(precision)._rotary_tables(9, 4, 6) for precision in ("fp32", "bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = load_tiny("bf16")._rotary_tables(9, 4, 6)
    for table, other, third in zip(exact, rounded, under_autocast, strict=True):
        assert table.shape == (9 * 4 * 6, 6, 16)
        assert torch.equal(table, other)
        assert torch.equal(table, third)


def test_a_plan_is_the_settings_with_the_device_settled() -> None:
    engine = EngineConfig(device="cpu", precision="fp32", attention="math", checkpointing="none")
    assert resolve_plan(engine, LOOKING).plan == Plan("cpu", "fp32", "math", "none")


def test_a_plan_with_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.attention: cudnn does not run on this cpu"):
        resolve_plan(EngineConfig(device="cpu", attention="cudnn"), LOOKING)


def test_a_missing_gpu_is_refused_and_auto_goes_without(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (resolve_device("auto"), resolve_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(UserError, match=r"engine\.device: cuda was asked for"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"

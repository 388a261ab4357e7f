"""Sums of adapters, and adapters inside the base: the same outputs, or a measured loss."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inputs import relative, velocity
from low_rank import product, trained
from safetensors.torch import load_file

from mochi_lora.config.schema import SampleConfig
from mochi_lora.data.samples import TextEmbedding
from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError
from mochi_lora.inference.generate import generate_latents
from mochi_lora.interop.base_merge import WEIGHTS, merge_into_base
from mochi_lora.interop.factors import Factors, adapter_of, factors_of
from mochi_lora.interop.merging import merge
from mochi_lora.model.adapter import put, strengths
from mochi_lora.model.tiny import TEXT_WIDTH
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import load_transformer


def guided(model: VelocityModel) -> torch.Tensor:
    """Latents of a short video: every step of it is fed by the one before."""
    draw = torch.Generator().manual_seed(0)
    text, null = TextEmbedding(torch.randn(5, TEXT_WIDTH, generator=draw)), TextEmbedding(torch.zeros(0, TEXT_WIDTH))
    settings = SampleConfig(frames=7, height=32, width=48, steps=4, guidance=3)
    return generate_latents(model, text, null, settings, 0, on_step=lambda _done, _steps: None)


def run(
    folder: Path, adapters: dict[str, tuple], precision: str = "fp32", what: Callable[..., torch.Tensor] = velocity
) -> torch.Tensor:
    """What the transformer in `folder` makes with each (adapter, weight): a velocity."""
    loaded = load_transformer(folder, device=torch.device("cpu"), precision=precision)
    model = VelocityModel(loaded.transformer, Plan("cpu", precision, "auto", "none"))
    for name, (adapter, _) in adapters.items():
        put(model.transformer, adapter, name)
    with strengths(model.transformer, list(adapters), [weight for _, weight in adapters.values()]):
        return what(model)


@pytest.fixture
def pair(load_tiny):
    """Two adapters of different rank, scale and targets."""
    first = trained(load_tiny(), alpha=8.0, targets="joint_attention")
    second = trained(load_tiny(), rank=3, alpha=2.0, rslora=True, targets="joint_attention_mlp")
    return first, second


def test_a_merged_adapter_acts_as_its_parts_together(pair, tiny: Path) -> None:
    merged = merge([(factors_of(pair[0]), 0.7), (factors_of(pair[1]), -0.3)])
    expected = run(tiny / "transformer", {"one": (pair[0], 0.7), "two": (pair[1], -0.3)})
    assert relative(run(tiny / "transformer", {"sum": (adapter_of(merged, "sum"), 1.0)}), expected) < 1e-5
    assert relative(run(tiny / "transformer", {}), expected) > 0.01
    ranks = {"to_q": merged["transformer_blocks.0.attn1.to_q"].rank, "ff": merged["transformer_blocks.0.ff.net.2"].rank}
    assert ranks == {"to_q": 4 + 3, "ff": 3}


def test_weight_nought_leaves_an_adapter_out() -> None:
    one, two = {"x": product(6, 5, 2)}, {"y": product(6, 5, 2)}
    assert merge([(one, 1.0), (two, 0.0)]).keys() == {"x"}


def test_adapters_of_different_models_are_not_added() -> None:
    with pytest.raises(UserError, match="x is 6 x 5 and 8 x 5 in the adapters to merge"):
        merge([({"x": product(6, 5, 2)}, 1.0), ({"x": product(8, 5, 2)}, 1.0)])


@pytest.mark.parametrize("folder", ["transformer", "."])
def test_a_base_with_the_adapter_inside_is_base_and_adapter(pair, tiny: Path, tmp_path: Path, folder: str) -> None:
    done = merge_into_base(factors_of(pair[1]), tiny / folder, tmp_path / "merged", float32=True)
    expected = run(tiny / "transformer", {"one": (pair[1], 1.0)})
    assert relative(run(tmp_path / "merged", {}), expected) < 1e-5
    video = run(tiny / "transformer", {"one": (pair[1], 1.0)}, what=guided)
    assert relative(run(tmp_path / "merged", {}, what=guided), video) < 1e-5
    assert relative(run(tiny / "transformer", {}, what=guided), video) > 0.01
    assert done.lost == 0
    assert done.linears == len(factors_of(pair[1]))


def test_what_the_bases_precision_rounds_away_is_told(pair, tiny: Path, tmp_path: Path) -> None:
    """The tiny base is stored in bf16, as the published one."""
    factors = factors_of(pair[0])
    done = merge_into_base(factors, tiny / "transformer", tmp_path / "merged", float32=False)
    before, after = load_file(tiny / "transformer" / WEIGHTS), load_file(tmp_path / "merged" / WEIGHTS)
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in factors}
    apart = whole = 0.0
    for name, part in factors.items():
        wanted = part.b.double() @ part.a.double()
        found = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        apart, whole = apart + float((found - wanted).norm() ** 2), whole + float(wanted.norm() ** 2)
    assert done.lost == pytest.approx((apart / whole) ** 0.5, rel=1e-3)
    assert done.lost > 1e-4


def test_an_adapter_of_another_architecture_is_named(tiny: Path, tmp_path: Path) -> None:
    odd = {"transformer_blocks.9.attn1.to_q": product(192, 192, 2), "transformer_blocks.0.attn1.to_q": product(64, 192, 2)}
    with pytest.raises(UserError, match=r"(?s)2 of 2 adapted linears.*blocks\.0\.attn1\.to_q.*blocks\.9\.attn1\.to_q"):
        merge_into_base(odd, tiny, tmp_path / "merged", float32=False)
    assert not (tmp_path / "merged").exists()


def test_a_folder_with_something_in_it_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        merge_into_base(
            {"transformer_blocks.0.attn1.to_q": Factors(torch.ones(1, 192), torch.ones(192, 1))}, tiny, tmp_path, float32=True
        )

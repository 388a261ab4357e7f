"""An adapter out of two bases: what went in comes out, and what does not fit is measured and named."""

import json
from pathlib import Path

import pytest
import torch
from inputs import normal, relative
from low_rank import trained
from safetensors.torch import load_file, save_file

from mochi_lora.errors import UserError
from mochi_lora.interop.base_formats import to_genmo
from mochi_lora.interop.base_merge import WEIGHTS, merge_into_base
from mochi_lora.interop.extraction import best_factors, extract
from mochi_lora.interop.factors import factors_of
from mochi_lora.model.adapter import Adapter

CPU = torch.device("cpu")


@pytest.fixture
def tuned(load_tiny, tiny: Path, tmp_path: Path) -> tuple[Path, Adapter]:
    adapter = trained(load_tiny(), alpha=8.0, targets="joint_attention_mlp")
    merge_into_base(factors_of(adapter), tiny, tmp_path / "tuned", float32=True)
    return tmp_path / "tuned", adapter


def test_an_adapter_that_was_merged_is_found_again(tuned, tiny: Path) -> None:
    folder, adapter = tuned
    found = extract(tiny, folder, 4, device=CPU)
    expected = factors_of(adapter)
    assert found.factors.keys() == expected.keys()
    assert all(relative(found.factors[name].delta(), part.delta()) < 1e-4 for name, part in expected.items())
    assert found.total < 1e-4
    assert found.left_out == ()


def test_a_rank_too_low_misses_what_is_reported(tuned, tiny: Path) -> None:
    folder, adapter = tuned
    found = extract(tiny, folder, 2, device=CPU)
    for name, part in factors_of(adapter).items():
        assert found.by_layer[name] == pytest.approx(relative(found.factors[name].delta(), part.delta()), rel=1e-3)
        values = torch.linalg.svdvals(part.delta().double())
        assert found.by_layer[name] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)


def test_genmos_file_is_a_base_as_well(tuned, tiny: Path, tmp_path: Path) -> None:
    folder, _ = tuned
    to_genmo(tiny / "transformer", tmp_path / "dit.safetensors")
    found = extract(tmp_path / "dit.safetensors", folder, 4, device=CPU)
    assert found.by_layer == extract(tiny, folder, 4, device=CPU).by_layer


def test_what_no_linear_holds_is_named(tuned, tiny: Path) -> None:
    folder, _ = tuned
    tensors = load_file(folder / WEIGHTS)
    tensors["transformer_blocks.0.attn1.norm_q.weight"] += 0.5
    tensors["proj_out.bias"] += 1
    save_file(tensors, folder / WEIGHTS)
    assert extract(tiny, folder, 4, device=CPU).left_out == ("proj_out.bias", "transformer_blocks.0.attn1.norm_q.weight")


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_the_randomised_decomposition_is_as_good_as_the_exact_one(shape: tuple[int, int]) -> None:
    """On the spectrum of a fine-tune, which falls slowly: singular values 1 / k."""
    u, _ = torch.linalg.qr(normal(shape[0], 300, seed=1))
    v, _ = torch.linalg.qr(normal(shape[1], 300, seed=2))
    values = 1 / torch.arange(1, 301)
    matrix = u * values @ v.T
    found, error = best_factors(matrix, 16)
    assert found.rank == 16
    assert error == pytest.approx(float(values[16:].norm()), rel=1e-3)
    assert error == pytest.approx(float((matrix - found.delta()).norm()), rel=1e-6)
    again, _ = best_factors(matrix, 16)
    assert torch.equal(again.a, found.a)


def test_two_equal_bases_have_nothing_to_extract(tiny: Path) -> None:
    with pytest.raises(UserError, match="no linear differs"):
        extract(tiny, tiny / "transformer", 4, device=CPU)


def test_another_architecture_is_named(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "transformer" / WEIGHTS)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:, :100].contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"1 tensors differ in shape:\n  proj_out\.weight"):
        extract(tiny, tmp_path, 4, device=CPU)

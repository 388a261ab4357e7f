"""`convert base --to fp8`: a folder that loads without rounding again, and that nothing takes for plain weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import MochiTransformer3DModel
from safetensors.torch import load_file, save_file

from mochi_lora.cli import main
from mochi_lora.engine.precision import quantise_linears
from mochi_lora.engine.quantised import QuantisedLinear
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.interop import quantised_base
from mochi_lora.interop.base_formats import to_genmo
from mochi_lora.interop.base_merge import WEIGHTS, merge_into_base
from mochi_lora.interop.extraction import extract
from mochi_lora.interop.quantised_base import to_fp8
from mochi_lora.model.weights import load_transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tiny: Path, tmp_path_factory) -> Path:
    """The tiny transformer in fp8. Tests read it, or copy it first."""
    folder = tmp_path_factory.mktemp("fp8") / "transformer"
    to_fp8(tiny / "transformer", folder)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_transformer(folder, device=CPU, precision="fp8")
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in loaded.transformer.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_it_loads_as_the_original_does_at_this_precision(tiny: Path, written: Path) -> None:
    assert same(state(written), state(tiny / "transformer"))


def test_nothing_is_rounded_when_it_loads(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantisedLinear, "quantise", None)
    load_transformer(written, device=CPU, precision="fp8")


def test_genmos_file_and_a_model_folder_do_as_well(tiny: Path, genmo_base: Path, written: Path, tmp_path: Path) -> None:
    assert same(state(_made(genmo_base, tmp_path / "a")), state(genmo_base))
    assert same(state(_made(tiny, tmp_path / "b")), state(written))


def _made(source: Path, target: Path) -> Path:
    to_fp8(source, target)
    return target


def test_it_takes_little_more_than_a_byte_per_weight(tiny: Path, written: Path) -> None:
    share = (written / WEIGHTS).stat().st_size / (tiny / "transformer" / WEIGHTS).stat().st_size
    assert share < 0.6


def test_tensors_that_were_stored_rounded_are_still_told(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "transformer", tmp_path / "rounded")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "rounded" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "rounded" / WEIGHTS)
    folder = _made(tmp_path / "rounded", tmp_path / "fp8")
    assert "pos_frequencies" in load_transformer(folder, device=CPU, precision="fp8").rounded


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_another_precision_is_refused(written: Path, precision: str) -> None:
    with pytest.raises(UserError, match=rf"quantised \(fp8\), but engine.precision is {precision}; set engine.precision: fp8"):
        load_transformer(written, device=CPU, precision=precision)


def test_a_form_of_others_is_refused(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised \(torchao\).*cannot read that form"):
        load_transformer(folder, device=CPU, precision="fp8")


def test_stock_diffusers_refuses_it(written: Path) -> None:
    with pytest.raises(ValueError, match="Unknown quantization type"):
        MochiTransformer3DModel.from_pretrained(written)


def test_codes_are_not_merged_into_extracted_from_or_converted(tiny: Path, written: Path, tmp_path: Path) -> None:
    expected = r"its weights are quantised \(fp8\); give the folder or the file that they were made from"
    with pytest.raises(UserError, match=expected):
        merge_into_base({}, written, tmp_path / "merged", float32=False)
    with pytest.raises(UserError, match=expected):
        extract(tiny / "transformer", written, 4, device=CPU)
    with pytest.raises(UserError, match=expected):
        to_genmo(written, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match=expected):
        to_fp8(written, tmp_path / "again")


def test_codes_of_another_version_are_refused(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "other")
    tensors = load_file(folder / WEIGHTS)
    name = "transformer_blocks.0.norm1.linear.weight"
    tensors[name] = tensors[name].view(torch.float8_e4m3fn)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=rf"{name} is stored as torch.float8_e4m3fn, precision fp8 holds it as torch.int8"):
        load_transformer(folder, device=CPU, precision="fp8")


def test_a_folder_without_a_scale_is_not_whole(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "other")
    tensors = load_file(folder / WEIGHTS)
    del tensors["transformer_blocks.0.attn1.to_q.weight_scale"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match="1 tensors are missing"):
        load_transformer(folder, device=CPU, precision="fp8")


def test_a_disk_that_changes_a_byte_is_noticed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = quantised_base.write_tensors

    def damaged(path: Path, *rest: object) -> None:
        write(path, *rest)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(quantised_base, "write_tensors", damaged)
    with pytest.raises(DamagedFileError, match="does not read back"):
        to_fp8(tiny / "transformer", tmp_path / "fp8")
    assert not (tmp_path / "fp8" / "config.json").exists()


def test_a_vae_has_no_fp8_form(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only the transformer has an fp8 form"):
        to_fp8(tiny / "vae", tmp_path / "fp8")


def test_the_command_writes_it_and_says_where_to_put_it(tiny: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", "base", str(tiny / "transformer"), str(tmp_path / "fp8"), "--to", "fp8"]) == 0
    assert "tensors read back bit for bit" in capsys.readouterr().out
    assert main(["convert", "base", "a", "b", str(tmp_path / "c"), "--to", "fp8"]) == 1
    assert "--to fp8 takes one transformer at a time" in capsys.readouterr().err


def test_no_linear_is_forgotten(written: Path) -> None:
    names = load_file(written / WEIGHTS).keys()
    transformer = MochiTransformer3DModel.from_config(MochiTransformer3DModel.load_config(written))
    quantise_linears(transformer, "fp8")
    assert names == dict(transformer.named_parameters()).keys()

"""`convert` and `lora` on the command line: what they print, write and refuse."""

import json
import re
from pathlib import Path

import pytest
from inputs import relative
from low_rank import GENMO, deltas, trained
from safetensors.torch import load_file, save_file

from mochi_lora.cli import main
from mochi_lora.interop.adapter_formats import detect, read_stored
from mochi_lora.interop.base_merge import WEIGHTS
from mochi_lora.model.adapter_file import load_adapter, read_provenance, save_adapter


@pytest.fixture
def adapter(load_tiny, tmp_path: Path) -> Path:
    """A trained adapter of rank 4, alpha 8, with a header as training writes it."""
    header = {"base": "some/mochi", "base_fingerprint": "abc", "step": 7, "config": {"train": {"steps": 900}}}
    save_adapter(tmp_path / "style.safetensors", trained(load_tiny(), alpha=8.0), header)
    return tmp_path / "style.safetensors"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path: Path):
    """Runs a command inside a folder of its own; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mochi_lora.console.console._width", 1000)

    def call(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        told = capsys.readouterr()
        return status, told.out, told.err

    return call


def cells(printed: str) -> dict[str, str]:
    """The two-column rows of the tables, by their first column."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_conversion_says_that_it_has_checked(run) -> None:
    status, out, _ = run("convert", "lora", GENMO, "d.safetensors", "--to", "diffusers")
    assert status == 0
    assert "genmo -> diffusers: 15 linears, ranks 2 to 4: d.safetensors" in out
    assert "checked: delta W of all 15 linears read back equal" in out
    assert detect(Path("d.safetensors")) == "diffusers"


def test_conversion_to_a_rank_says_what_it_cost(run, adapter: Path) -> None:
    status, out, _ = run("convert", "lora", adapter, "c.safetensors", "--to", "comfyui", "--rank", 4)
    assert status == 0
    assert "% off in all, at most " in out
    assert {t.shape[0] for name, t in load_file("c.safetensors").items() if "lora_A" in name} == {4}


def test_merge_weighs_and_remembers(run, adapter: Path) -> None:
    run("convert", "lora", adapter, "c.safetensors", "--to", "comfyui")
    status, out, _ = run("lora", "merge", f"{adapter}:0.5", "c.safetensors:0.25", "sum.safetensors")
    assert status == 0
    assert "0.5 x style.safetensors + 0.25 x c.safetensors: sum.safetensors (rank 8)" in out
    found, one = deltas(load_adapter(Path("sum.safetensors")), 1.0), deltas(load_adapter(adapter), 2.0)
    assert found.keys() == one.keys()
    assert all(relative(found[name], 0.75 * change) < 1e-6 for name, change in one.items())
    history = read_provenance(Path("sum.safetensors"))
    assert history["merged_from"] == [{"file": "style.safetensors", "weight": 0.5}, {"file": "c.safetensors", "weight": 0.25}]
    assert (history["base"], "step" in history) == ("some/mochi", False)


@pytest.mark.parametrize("last", ["b.safetensors:0.3", "nowhere.safetensors:-1", "b.safetensors:0,3", "b.safetensors:"])
@pytest.mark.parametrize("more", [[], ["--into-base", "base"]])
def test_an_adapter_in_the_place_of_the_output_is_no_output(run, adapter: Path, last: str, more: list[str]) -> None:
    Path("b.safetensors").write_bytes(adapter.read_bytes())
    before = sorted(path.name for path in Path().iterdir())
    status, _, err = run("lora", "merge", f"{adapter}:0.7", last, *more)
    told = " ".join(err.split())
    assert status == 2
    assert f"OUT {last!r}: reads like an adapter with its weight" in told
    assert "mochi-lora lora merge PATH[:WEIGHT] [PATH[:WEIGHT] ...] OUT" in told
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_colon_elsewhere_in_the_output_is_part_of_its_name(run, adapter: Path) -> None:
    assert run("lora", "merge", adapter, "a:1/sum:both.safetensors")[0] == 0
    assert Path("a:1/sum:both.safetensors").is_file()


@pytest.mark.parametrize("weights", [(1, -1), (0.3, -0.1, -0.2), (1e-6, -1e-6)])
def test_a_sum_of_which_nothing_is_left_is_refused_in_these_words(run, adapter: Path, tiny: Path, weights) -> None:
    """Exactly, or but for the rounding of the weights."""
    words = [f"{adapter}:{weight}" for weight in weights]
    count = len(deltas(load_adapter(adapter), 1.0))
    for more in ((), ("--rank", 2), ("--into-base", tiny)):
        status, _, err = run("lora", "merge", *words, "sum.safetensors", *more)
        assert (status, Path("sum.safetensors").exists()) == (1, False)
        assert f"nothing is left of the sum: delta W is zero, but for rounding, in all {count} linears" in err
        assert "damaged" not in err
        assert "reads back" not in err


def test_a_small_rest_of_a_sum_is_no_rounding(run, adapter: Path) -> None:
    assert run("lora", "merge", f"{adapter}:1", f"{adapter}:-0.9999", "sum.safetensors")[0] == 0
    found, one = deltas(load_adapter(Path("sum.safetensors")), 1.0), deltas(load_adapter(adapter), 2.0)
    assert all(relative(found[name], 1e-4 * change) < 1e-2 for name, change in one.items())


@pytest.mark.parametrize("more", [(), ("--rank", 4)])
def test_a_linear_that_two_adapters_share_may_cancel_while_the_others_do_not(run, adapter: Path, load_tiny, more) -> None:
    other, shared = trained(load_tiny(), alpha=8.0), "transformer_blocks.0.attn1.to_q."
    for name, tensor in other.tensors.items():
        if not name.startswith(shared):
            other.tensors[name] = tensor.flip(0).contiguous()
    save_adapter(Path("other.safetensors"), other, {})
    status, out, err = run("lora", "merge", adapter, "other.safetensors:-1", "sum.safetensors", *more)
    assert status == 0, err
    expected, minus = (deltas(load_adapter(path), 2.0) for path in (adapter, Path("other.safetensors")))
    found = deltas(load_adapter(Path("sum.safetensors")), 1.0)
    assert found.keys() == expected.keys()
    if more:
        assert float(re.search(r"at most (\d+\.\d+)% \(", out)[1]) < 100, "a linear that is nothing cannot be missed"
        return
    assert float(re.search(r"the largest relative difference is (\S+)", out)[1]) < 1e-6
    assert found[f"{shared}"[:-1]].norm() < 1e-12
    for name in expected.keys() - {shared[:-1]}:
        assert relative(found[name], expected[name] - minus[name]) < 1e-6


def test_merge_into_the_base_writes_a_folder(run, adapter: Path, tiny: Path) -> None:
    status, out, _ = run("lora", "merge", f"{adapter}:0.5", "merged", "--into-base", tiny)
    assert status == 0
    assert "rounding to the precision of the base lost " in out
    before, after = (load_file(folder / WEIGHTS) for folder in (tiny / "transformer", Path("merged")))
    name = "transformer_blocks.0.attn1.to_q"
    change = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
    assert relative(change, deltas(load_adapter(adapter), 1.0)[name]) < 0.05
    assert run("lora", "merge", adapter, "exact", "--into-base", tiny, "--float32")[0] == 0


def test_merging_adapters_of_two_bases_is_noted(run, adapter: Path) -> None:
    save_adapter(Path("other.safetensors"), load_adapter(adapter), {"base_fingerprint": "def"})
    assert "trained on different bases" in run("lora", "merge", adapter, "other.safetensors", "sum.safetensors")[1]
    assert "base_fingerprint" not in read_provenance(Path("sum.safetensors"))


def test_a_whole_model_given_to_convert_base_is_told_which_folder_to_give(run, tiny: Path) -> None:
    status, _, told = run("convert", "base", tiny, "genmo", "--to", "genmo")
    assert status == 1
    assert f"it is a whole model: give {tiny / 'transformer'} or {tiny / 'vae'}" in told


def test_resize_to_a_rank_that_is_no_smaller_reduces_nothing_and_says_so(run, adapter: Path) -> None:
    status, out, _ = run("lora", "resize", adapter, "same.safetensors", "--rank", 64)
    assert (status, "none above 64: nothing to reduce" in out, "reduced to" in out) == (0, True, False)


def test_resize_keeps_the_layout_and_tells_the_loss(run, adapter: Path) -> None:
    run("convert", "lora", adapter, "g.safetensors", "--to", "genmo")
    status, out, _ = run("lora", "resize", "g.safetensors", "small.safetensors", "--rank", 2)
    assert status == 0
    assert detect(Path("small.safetensors")) == "genmo"
    assert "reduced to at most 2" in out
    assert "% off in all" in out


def test_extraction_finds_what_was_merged(run, adapter: Path, tiny: Path) -> None:
    run("lora", "merge", adapter, "tuned", "--into-base", tiny, "--float32")
    status, out, _ = run("lora", "extract", tiny, "tuned", "found.safetensors", "--rank", 4)
    assert status == 0
    assert "missed by 0.00% in all" in out
    found, expected = deltas(load_adapter(Path("found.safetensors")), 1.0), deltas(load_adapter(adapter), 2.0)
    assert all(relative(found[name], change) < 1e-4 for name, change in expected.items())


def test_inspect_shows_what_the_file_is_and_does(run, adapter: Path) -> None:
    status, out, _ = run("lora", "inspect", adapter)
    assert status == 0
    found, change = cells(out), deltas(load_adapter(adapter), 2.0)
    assert (found["format"], found["alpha"], found["rank"]) == ("diffusers", "8", f"4 ({len(change)} linears)")
    assert "attn1.to_out.0" in found["targets"]
    assert (found["step"], found["base"]) == ("7", "some/mochi")
    assert "steps: 900" in out
    header = next(line for line in out.splitlines() if "┃ block" in line)
    row = next(line for line in out.splitlines() if line.startswith("│ 1 "))
    column = [cell.strip() for cell in header.split("┃")].index("attn1.to_v")
    shown = float(row.split("│")[column])
    assert shown == pytest.approx(float(change["transformer_blocks.1.attn1.to_v"].norm()), rel=0.01)


def test_inspect_reads_genmos_alphas_and_a_dora(run, load_tiny) -> None:
    assert cells(run("lora", "inspect", GENMO)[1])["alpha"] == "qkv 8, out 6"
    save_adapter(Path("dora.safetensors"), trained(load_tiny(), dora=True), {})
    out = run("lora", "inspect", "dora.safetensors")[1]
    assert cells(out)["kind"] == "DoRA"
    assert "DoRA's magnitudes act as well" in out


def test_the_base_goes_to_diffusers_and_back(run, genmo_base: Path) -> None:
    status, out, _ = run("convert", "base", genmo_base, "transformer")
    assert status == 0
    assert "checked: 59 tensors read back bit for bit" in out
    assert run("convert", "base", "transformer", "dit.safetensors", "--to", "genmo")[0] == 0
    assert load_file("dit.safetensors").keys() == load_file(genmo_base).keys()


def test_both_halves_of_the_vae_make_one_folder(run, tiny: Path) -> None:
    assert run("convert", "base", tiny / "vae", "genmo", "--to", "genmo")[0] == 0
    assert run("convert", "base", "genmo/encoder.safetensors", "genmo/decoder.safetensors", "vae")[0] == 0
    assert json.loads(Path("vae/config.json").read_text())["_class_name"] == "AutoencoderKLMochi"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("convert lora style.safetensors style.safetensors --to genmo", 1, "style.safetensors: exists; give a new file name"),
        ("convert lora nowhere.safetensors x.safetensors --to genmo", 1, "nowhere.safetensors: no such adapter file"),
        ("convert base transformer vae x --to genmo", 1, "--to genmo takes one folder at a time"),
        ("lora merge style.safetensors:0 x.safetensors", 1, "every weight is 0"),
        ("lora merge style.safetensors x.safetensors --float32", 2, "--float32 is about the base's linears"),
        ("lora merge style.safetensors x --into-base nowhere", 1, "nowhere: no such folder; expected a transformer folder"),
        ("lora inspect style.safetensors --train.steps 5", 2, "lora takes no settings, got --train.steps 5"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(run, adapter: Path, words: str, status: int, message: str) -> None:
    before = adapter.read_bytes()
    found, _, err = run(*words.split())
    assert (found, message in err) == (status, True), err
    assert adapter.read_bytes() == before
    assert not Path("x.safetensors").exists()


def test_a_file_without_its_alpha_needs_to_be_told(run) -> None:
    save_file(load_file(GENMO), "g.safetensors")
    status, _, err = run("convert", "lora", "g.safetensors", "d.safetensors", "--to", "diffusers")
    assert status == 1
    assert "--assume-alpha rank" in err
    assert run("convert", "lora", "g.safetensors", "d.safetensors", "--to", "diffusers", "--assume-alpha", "rank")[0] == 0
    assert read_stored(Path("d.safetensors")).adapter.config["lora_alpha"] == 4

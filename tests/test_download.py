"""The base model from a hub: what is fetched, what is not, and what happens when the line, the disk or the file is bad."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub import COMMIT, Hub, serve
from safetensors.torch import load_file, save_file

from mochi_lora.cli import main
from mochi_lora.engine.precision import is_kept_float32
from mochi_lora.interop.stored import transformer_tensors
from mochi_lora.model.base import fingerprint, locate
from mochi_lora.model.float32_tensors import write_float32
from mochi_lora.model.layout import FLOAT32_TENSORS
from mochi_lora.model.places import RECORD
from mochi_lora.model.vae import MochiVae
from mochi_lora.model.weights import load_transformer

STEM = "diffusion_pytorch_model"
SINGLE = f"{STEM}.safetensors"
VAE = f"vae/{SINGLE}"
TEXT = ("text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors")
FULL = tuple(f"transformer/{STEM}-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
ROUNDED = tuple(f"transformer/{STEM}.bf16-0000{number}-of-00002.safetensors" for number in (1, 2))
ROUNDED_INDEX = f"transformer/{SINGLE}.index.bf16.json"
NOT_NEEDED = (
    "README.md",
    "dit.safetensors",
    "vae/diffusion_pytorch_model.bf16.safetensors",
    "text_encoder/model-00001-of-00001.safetensors",
    "transformer/evil.bin",
)


def shard(tensors: dict[str, torch.Tensor], root: Path, names: tuple[str, ...], index: str) -> None:
    places = {name: names[number % len(names)] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name].contiguous() for name, place in places.items() if place == file}, root / file)
    index_of = {name: Path(file).name for name, file in places.items()}
    (root / index).write_text(json.dumps({"metadata": {}, "weight_map": index_of}))


@pytest.fixture(scope="module")
def published(tiny: Path, tmp_path_factory) -> Path:
    """A tiny model with the file names of genmo/mochi-1-preview @14be5fc, duplicates and all."""
    root = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("hub") / "published"))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: tensor.float() for name, tensor in load_file(root / "transformer" / SINGLE).items()}
    for name in filter(is_kept_float32, tensors):  # numbers that bf16 cannot hold
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    (root / "transformer" / SINGLE).unlink()
    shard(tensors, root, FULL, f"transformer/{SINGLE}.index.json")
    shard({name: tensor.bfloat16() for name, tensor in tensors.items()}, root, ROUNDED, ROUNDED_INDEX)
    shard(load_file(root / "text_encoder" / "model.safetensors"), root, TEXT, "text_encoder/model.safetensors.index.json")
    (root / "text_encoder" / "model.safetensors").unlink()
    for name in NOT_NEEDED:
        (root / name).write_bytes(b"not needed" * 2000)
    return root


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch) -> Iterator[Hub]:
    """The hub, and an empty cache of its own."""
    with serve(Hub(published)) as served:
        huggingface_hub.close_session()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("mochi_lora.model.transfer._PAUSE_SECONDS", 0.0)
        yield served
        huggingface_hub.close_session()


@pytest.fixture
def own(hub: Hub, tmp_path: Path) -> Hub:
    """The hub with files that a test may change."""
    hub.root = Path(shutil.copytree(hub.root, tmp_path / "own"))
    return hub


def snapshot(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--genmo--mochi-1-preview" / "snapshots" / COMMIT


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def exact_of(published: Path) -> dict[str, torch.Tensor]:
    return {n: tensor for file in FULL for n, tensor in load_file(published / file).items() if is_kept_float32(n)}


def test_only_what_is_needed_is_fetched_in_bf16(hub: Hub, tmp_path: Path) -> None:
    assert main(["download"]) == 0
    assert not hub.fetched() & {*NOT_NEEDED, *FULL}
    assert files_in(snapshot(tmp_path)) == (hub.fetched() - {f"transformer/{SINGLE}.index.json"}) | {
        f"transformer/{FLOAT32_TENSORS}"
    }
    assert {*ROUNDED, ROUNDED_INDEX, *TEXT, VAE, "tokenizer/tokenizer.json", "model_index.json"} <= files_in(snapshot(tmp_path))
    for name in files_in(snapshot(tmp_path)) - {f"transformer/{FLOAT32_TENSORS}"}:
        assert (snapshot(tmp_path) / name).read_bytes() == (hub.root / name).read_bytes(), name


def test_the_tensors_that_bf16_rounds_come_from_the_float32_file_bit_for_bit(hub: Hub, tmp_path: Path) -> None:
    assert main(["download"]) == 0
    loaded = load_transformer(snapshot(tmp_path) / "transformer", device=torch.device("cpu"), precision="bf16")
    whole = load_transformer(hub.root / "transformer", device=torch.device("cpu"), precision="bf16")
    assert loaded.rounded == ()
    state, expected = loaded.transformer.state_dict(), whole.transformer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    exact = exact_of(hub.root)
    assert len(exact) == 9
    assert all(torch.equal(state[name], tensor) for name, tensor in exact.items())
    (snapshot(tmp_path) / "transformer" / FLOAT32_TENSORS).unlink()
    without = load_transformer(snapshot(tmp_path) / "transformer", device=torch.device("cpu"), precision="bf16")
    assert set(without.rounded) == set(exact)


def test_of_the_float32_files_only_ranges_are_asked_for_and_few(hub: Hub) -> None:
    assert main(["download"]) == 0
    header = 8 + max(int.from_bytes((hub.root / file).read_bytes()[:8], "little") for file in FULL)
    for file in FULL:
        asked = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in hub.ranges_of(file)]
        size, wanted = (hub.root / file).stat().st_size, load_file(hub.root / file)
        kept = sum(tensor.numel() * 4 for name, tensor in wanted.items() if is_kept_float32(name))
        groups = len(asked) - 2
        assert groups <= sum(map(is_kept_float32, wanted))
        assert sum(end + 1 - start for start, end in asked) <= min(size, header + kept + groups * 2**16)


def test_tools_that_convert_the_base_see_the_exact_tensors_too(hub: Hub, tmp_path: Path) -> None:
    assert main(["download"]) == 0
    tensors = transformer_tensors(snapshot(tmp_path))
    assert all(torch.equal(tensors[name].read(), tensor) for name, tensor in exact_of(hub.root).items())


def test_what_was_downloaded_is_found_without_a_network(hub: Hub, tmp_path: Path) -> None:
    assert main(["download"]) == 0
    hub.asked.clear()
    for component in ("transformer", "vae", "text_encoder", "tokenizer"):
        assert locate("genmo/mochi-1-preview", None, component) == snapshot(tmp_path) / component
        assert locate("genmo/mochi-1-preview", COMMIT, component) == snapshot(tmp_path) / component
    assert hub.asked == []
    MochiVae.load(snapshot(tmp_path) / "vae", device=torch.device("cpu"), precision="fp32")


def test_stock_huggingface_finds_the_files_in_its_cache(hub: Hub, tmp_path: Path) -> None:
    assert main(["download"]) == 0
    found = huggingface_hub.snapshot_download(hub.base, local_files_only=True, cache_dir=tmp_path / "cache")
    assert Path(found) == snapshot(tmp_path)
    (repository,) = huggingface_hub.scan_cache_dir(tmp_path / "cache").repos
    assert not huggingface_hub.scan_cache_dir(tmp_path / "cache").warnings
    assert {file.file_name for revision in repository.revisions for file in revision.files} >= {"model_index.json", SINGLE}


def test_a_component_that_is_needed_is_fetched_at_first_use_and_alone(hub: Hub, tmp_path: Path) -> None:
    assert locate(hub.base, None, "vae") == snapshot(tmp_path) / "vae"
    assert files_in(snapshot(tmp_path)) == {"model_index.json", "vae/config.json", VAE}
    locate(hub.base, None, "transformer")
    assert f"transformer/{FLOAT32_TENSORS}" in files_in(snapshot(tmp_path))


def test_a_run_stays_with_the_commit_it_began_with(hub: Hub, tmp_path: Path) -> None:
    locate(hub.base, None, "vae")
    hub.commit = "f" * 40
    assert locate(hub.base, None, "vae").parent.name == COMMIT
    hub.tags = ("main", COMMIT)
    hub.commit = COMMIT
    assert locate(hub.base, None, "tokenizer").parent.name == COMMIT


def test_full_precision_fetches_the_float32_files_and_no_others(hub: Hub, tmp_path: Path) -> None:
    assert main(["download", "--precision", "fp32"]) == 0
    assert set(FULL) <= hub.fetched()
    assert not hub.fetched() & {*ROUNDED, *NOT_NEEDED}
    assert load_transformer(snapshot(tmp_path) / "transformer", device=torch.device("cpu"), precision="bf16").rounded == ()


def test_a_float32_transformer_that_is_there_is_not_joined_by_a_bf16_one(hub: Hub, tmp_path: Path) -> None:
    """A run's identity hashes the folder: more files in it would make its resume a stranger's."""
    assert main(["download", "--precision", "fp32"]) == 0
    before = fingerprint(snapshot(tmp_path) / "transformer")
    assert main(["download"]) == 0
    assert fingerprint(snapshot(tmp_path) / "transformer") == before


def test_a_plain_folder_holds_files_not_links_and_is_a_base(hub: Hub, tmp_path: Path, capsys) -> None:
    assert main(["download", "--to", str(tmp_path / "mochi")]) == 0
    assert not [path for path in (tmp_path / "mochi").rglob("*") if path.is_symlink()]
    assert not (tmp_path / "cache").exists()
    assert locate(str(tmp_path / "mochi"), None, "vae") == tmp_path / "mochi" / "vae"
    assert f"--model.base {tmp_path / 'mochi'}" in capsys.readouterr().out
    hub.asked.clear()
    assert main(["download", "--to", str(tmp_path / "mochi")]) == 0
    assert hub.fetched() <= {f"transformer/{SINGLE}.index.json", ROUNDED_INDEX, "text_encoder/model.safetensors.index.json"}


def changed(content: bytes) -> bytes:
    """Other weights of the same size, in a file that is still whole."""
    return content[:-1] + bytes([content[-1] ^ 1])


def another_commit(own: Hub) -> None:
    """The hub goes on to a commit whose VAE and transformer are others, of the same sizes."""
    own.commit = "f" * 40
    (own.root / VAE).write_bytes(changed((own.root / VAE).read_bytes()))
    for file in (*FULL, *ROUNDED):
        save_file({name: tensor * 2 for name, tensor in load_file(own.root / file).items()}, own.root / file)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def test_a_folder_that_holds_another_commit_is_refused_and_left_as_it_is(own: Hub, tmp_path: Path, capsys) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main(words) == 0
    before = contents(tmp_path / "mochi")
    another_commit(own)
    for more in ([], ["--verify"]):
        assert main([*words, *more]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert f"{tmp_path / 'mochi'}: holds {own.base} @ {COMMIT}" in told
        assert f"asked for {own.base} @ {'f' * 40}; choose another folder, delete this one" in told
        assert f"--model.revision {COMMIT}" in told
        assert contents(tmp_path / "mochi") == before


def test_a_folder_that_was_broken_off_goes_on_with_its_own_commit_only(own: Hub, tmp_path: Path, capsys) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    own.breaks_after[VAE] = 0
    assert main(words) == 1
    assert json.loads((tmp_path / "mochi" / RECORD).read_text()) == {"base": own.base, "commit": COMMIT}
    own.breaks_after.clear()
    own.commit = "f" * 40
    assert main(words) == 1
    assert "choose another folder" in capsys.readouterr().err
    own.commit = COMMIT
    assert main(words) == 0
    assert (tmp_path / "mochi" / VAE).read_bytes() == (own.root / VAE).read_bytes()


def test_a_folder_that_holds_another_model_is_refused(own: Hub, tmp_path: Path, capsys) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main(words) == 0
    own.base = "somebody/mochi-tuned"
    assert main([*words, "--model.base", own.base]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"holds genmo/mochi-1-preview @ {COMMIT}" in told
    assert f"asked for somebody/mochi-tuned @ {COMMIT}; choose another folder, or delete this one" in told
    assert "--model.revision" not in told


def test_the_record_is_there_before_the_first_weight_and_not_where_nothing_fits(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
        assert main(words) == 1
    assert not (tmp_path / "mochi").exists()
    found = []
    monkeypatch.setattr(
        "mochi_lora.model.fetch.write_float32",
        lambda *given: found.append(files_in(tmp_path / "mochi")) or write_float32(*given),
    )
    assert main(words) == 0
    assert found == [{RECORD}]


def test_an_older_download_without_a_record_is_checked_and_gets_one(hub: Hub, tmp_path: Path, capsys) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main(words) == 0
    before = contents(tmp_path / "mochi")
    (tmp_path / "mochi" / RECORD).unlink()
    hub.asked.clear()
    assert main(words) == 0
    assert "its files are checked once" in capsys.readouterr().out
    assert contents(tmp_path / "mochi") == before
    assert not hub.fetched() & {VAE, *ROUNDED}
    assert main(words) == 0
    assert "its files are checked once" not in capsys.readouterr().out


def test_files_of_unknown_origin_are_neither_taken_nor_overwritten(own: Hub, tmp_path: Path, capsys) -> None:
    """They may be somebody's fine-tune, of the same sizes as the model it was made from."""
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main(words) == 0
    (tmp_path / "mochi" / RECORD).unlink()
    (tmp_path / "mochi" / "README.md").write_text("our own")
    before = contents(tmp_path / "mochi")
    another_commit(own)
    assert main(words) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"holds other files than {own.base} @ {'f' * 40}: 3, the first is {ROUNDED[0]}" in told
    assert "choose another folder, delete this one, or add --verify" in told
    assert contents(tmp_path / "mochi") == before


def test_a_float32_transformer_of_unknown_origin_is_refused_although_bf16_is_wanted(hub: Hub, tmp_path: Path, capsys) -> None:
    """The loader would take it, whole as it is, instead of the bf16 one."""
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main([*words, "--precision", "fp32"]) == 0
    (tmp_path / "mochi" / RECORD).unlink()
    with (tmp_path / "mochi" / FULL[0]).open("ab") as stream:
        stream.write(b"more")
    assert main(words) == 1
    assert f"1, the first is {FULL[0]}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "mochi" / ROUNDED[0]).exists()


def test_with_verify_files_of_unknown_origin_are_replaced_all_of_them(own: Hub, tmp_path: Path, capsys) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main([*words, "--precision", "fp32"]) == 0
    assert main(words) == 0
    (tmp_path / "mochi" / RECORD).unlink()
    another_commit(own)
    (tmp_path / "mochi" / "vae" / "config.json").write_text("{}")  # of another size
    assert main([*words, "--verify"]) == 0
    told = capsys.readouterr().out
    assert all(f"damaged  {name}" in told for name in (VAE, "vae/config.json", *FULL))
    assert main(["download", "--to", str(tmp_path / "fresh")]) == 0
    loaded = [
        load_transformer(tmp_path / name / "transformer", device=torch.device("cpu"), precision="bf16")
        for name in ("mochi", "fresh")
    ]
    states = [one.transformer.state_dict() for one in loaded]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert (tmp_path / "mochi" / VAE).read_bytes() == (own.root / VAE).read_bytes()


def test_float32_tensors_of_another_commit_are_fetched_again(own: Hub, tmp_path: Path) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main(words) == 0
    kept = tmp_path / "mochi" / "transformer" / FLOAT32_TENSORS
    before = kept.read_bytes()
    for name in files_in(tmp_path / "mochi") - {f"transformer/{FLOAT32_TENSORS}"}:
        (tmp_path / "mochi" / name).unlink()  # an older download, killed when it had just begun
    another_commit(own)
    assert main(words) == 0
    assert kept.read_bytes() != before
    assert all(torch.equal(tensor, exact_of(own.root)[name]) for name, tensor in load_file(kept).items())


def test_damaged_float32_tensors_are_fetched_again(hub: Hub, tmp_path: Path) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main(words) == 0
    kept = tmp_path / "mochi" / "transformer" / FLOAT32_TENSORS
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
    assert main(words) == 0
    assert all(torch.equal(tensor, exact_of(hub.root)[name]) for name, tensor in load_file(kept).items())


def test_float32_tensors_of_another_commit_go_where_the_new_one_has_none(own: Hub, tmp_path: Path) -> None:
    words = ["download", "--to", str(tmp_path / "mochi")]
    assert main(words) == 0
    kept = tmp_path / "mochi" / "transformer" / FLOAT32_TENSORS
    for name in files_in(tmp_path / "mochi") - {f"transformer/{FLOAT32_TENSORS}"}:
        (tmp_path / "mochi" / name).unlink()
    own.commit = "f" * 40
    for file in FULL:
        save_file({name: tensor.bfloat16() for name, tensor in load_file(own.root / file).items()}, own.root / file)
    assert main(words) == 0
    assert not kept.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"base": "genmo/mochi-1-preview"}', '{"base": 1, "commit": 2}'])
def test_a_record_that_cannot_be_read_is_told(hub: Hub, tmp_path: Path, capsys, text: str) -> None:
    (tmp_path / "mochi").mkdir()
    (tmp_path / "mochi" / RECORD).write_text(text)
    assert main(["download", "--to", str(tmp_path / "mochi")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"{RECORD}: does not say what was downloaded here" in told
    assert "delete it, and the files are checked by their checksums" in told
    assert files_in(tmp_path / "mochi") == {RECORD}


def test_a_broken_file_goes_on_from_its_last_byte(hub: Hub, tmp_path: Path, capsys) -> None:
    size = (hub.root / VAE).stat().st_size
    hub.breaks_after[VAE] = 0
    assert main(["download", "--to", str(tmp_path / "mochi")]) == 1
    assert re.search(rf"{VAE}: the connection broke 5 times in a row.*run the command again", capsys.readouterr().err)
    part = tmp_path / "mochi" / f"{VAE}.incomplete"
    part.write_bytes((hub.root / VAE).read_bytes()[: size // 3])  # as a killed process leaves it
    hub.breaks_after.clear()
    hub.asked.clear()
    assert main(["download", "--to", str(tmp_path / "mochi")]) == 0
    assert hub.ranges_of(VAE) == [f"bytes={size // 3}-"]
    assert not part.exists()
    assert (tmp_path / "mochi" / VAE).read_bytes() == (hub.root / VAE).read_bytes()


def test_a_line_that_breaks_again_and_again_still_brings_the_file(hub: Hub, tmp_path: Path) -> None:
    size = (hub.root / VAE).stat().st_size
    hub.breaks_after[VAE] = size // 9 + 1
    assert main(["download", "--to", str(tmp_path / "mochi")]) == 0
    starts = [0, *(int(text[6:-1]) for text in hub.ranges_of(VAE)[1:])]
    assert len(starts) == 9
    assert starts == sorted(set(starts))
    assert (tmp_path / "mochi" / VAE).read_bytes() == (hub.root / VAE).read_bytes()


def test_a_server_without_ranges_gives_the_rest_all_the_same(hub: Hub, tmp_path: Path) -> None:
    hub.knows_ranges = False
    part = tmp_path / "mochi" / f"{VAE}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes((hub.root / VAE).read_bytes()[:5000])
    assert main(["download", "--to", str(tmp_path / "mochi"), "--precision", "fp32"]) == 0
    assert (tmp_path / "mochi" / VAE).read_bytes() == (hub.root / VAE).read_bytes()


def test_a_server_without_ranges_is_not_asked_for_forty_gigabytes(hub: Hub, tmp_path: Path, capsys) -> None:
    hub.knows_ranges = False
    assert main(["download"]) == 1
    assert "expected HTTP range requests; use --precision fp32" in capsys.readouterr().err


@pytest.mark.parametrize("name", [VAE, "vae/config.json"])
def test_wrong_content_is_refused_by_name_and_fetched_again(hub: Hub, tmp_path: Path, capsys, name: str) -> None:
    content = (hub.root / name).read_bytes()
    hub.wrong[name] = content[:-1] + bytes([content[-1] ^ 1])
    assert main(["download"]) == 1
    assert f"{name}: what came has another checksum than the hub announces" in capsys.readouterr().err
    assert name not in files_in(snapshot(tmp_path)) if snapshot(tmp_path).exists() else True
    hub.wrong.clear()
    assert main(["download"]) == 0
    assert (snapshot(tmp_path) / name).read_bytes() == content


def test_a_file_damaged_on_the_disk_is_found_by_verify_and_fetched_again(hub: Hub, tmp_path: Path, capsys) -> None:
    assert main(["download"]) == 0
    path = snapshot(tmp_path) / VAE
    content = path.read_bytes()
    path.resolve().write_bytes(bytes(len(content)))
    assert main(["download"]) == 0
    assert path.read_bytes() != content
    assert main(["download", "--verify"]) == 0
    assert f"damaged  {VAE}" in capsys.readouterr().out
    assert path.read_bytes() == content


def test_a_disk_too_small_is_said_before_a_byte_is_fetched(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    assert main(["download"]) == 1
    told = capsys.readouterr()
    assert re.search(r"1\.1 GB are needed \(1 GB of it to spare\), 1\.0 GB are free", told.err)
    assert VAE in told.out
    assert not [text for file in FULL for text in hub.ranges_of(file)]
    assert not (tmp_path / "cache" / "models--genmo--mochi-1-preview" / "blobs").exists()


def test_float32_tensors_of_another_model_are_refused(own: Hub, tmp_path: Path, capsys) -> None:
    for file in FULL:
        tensors = load_file(own.root / file)
        save_file(
            {name: tensor * 1.02 if is_kept_float32(name) else tensor for name, tensor in tensors.items()}, own.root / file
        )
    assert main(["download"]) == 1
    assert "in bf16 is not what the float32 checkpoint has, rounded; they are two models" in capsys.readouterr().err
    assert not (snapshot(tmp_path) / "transformer" / FLOAT32_TENSORS).exists()


def test_a_bf16_variant_that_was_cut_off_instead_of_rounded_is_the_same_model(own: Hub) -> None:
    exact = exact_of(own.root)
    for file in ROUNDED:
        tensors = load_file(own.root / file)
        for name in tensors.keys() & exact.keys():
            tensors[name] = (exact[name].view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        save_file(tensors, own.root / file)
    assert main(["download"]) == 0


def test_a_checkpoint_that_is_rounded_itself_has_nothing_to_keep(own: Hub, tmp_path: Path, capsys) -> None:
    for file in FULL:
        save_file({name: tensor.bfloat16() for name, tensor in load_file(own.root / file).items()}, own.root / file)
    assert main(["download"]) == 0
    assert "hold no tensor in float32" in capsys.readouterr().out
    assert not (snapshot(tmp_path) / "transformer" / FLOAT32_TENSORS).exists()


@pytest.mark.parametrize("start", [b"\x00" * 8, b"\xff" * 8])
def test_a_float32_file_without_a_header_is_refused_by_name(own: Hub, capsys, start: bytes) -> None:
    for file in FULL:
        (own.root / file).write_bytes(start + (own.root / file).read_bytes()[8:])
    assert main(["download"]) == 1
    assert f"{FULL[0]}: does not begin like a safetensors file" in capsys.readouterr().err


def test_a_model_without_a_bf16_variant_is_taken_as_it_is(own: Hub, tmp_path: Path) -> None:
    for name in (*ROUNDED, ROUNDED_INDEX):
        (own.root / name).unlink()
    assert main(["download"]) == 0
    assert set(FULL) <= files_in(snapshot(tmp_path))


def test_a_model_with_nothing_but_bf16_is_taken_as_it_is(own: Hub, tmp_path: Path, capsys) -> None:
    for name in (*FULL, f"transformer/{SINGLE}.index.json"):
        (own.root / name).unlink()
    assert main(["download", "--precision", "fp32"]) == 1
    assert "has the transformer in bf16 only; use --precision bf16" in capsys.readouterr().err
    assert main(["download"]) == 0
    assert len(load_transformer(snapshot(tmp_path) / "transformer", device=torch.device("cpu"), precision="bf16").rounded) == 9


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([VAE], "on the hub has no vae; expected a diffusers layout such as genmo/mochi-1-preview"),
        ([TEXT[1]], rf"on the hub lacks {TEXT[1]}, which its index names"),
    ],
)
def test_a_repository_that_lacks_a_part_is_refused_by_its_name(own: Hub, capsys, gone: list[str], message: str) -> None:
    for name in gone:
        (own.root / name).unlink()
    assert main(["download"]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.base", "nobody/nothing"], "model.base: there is no local folder nobody/nothing, and the hub has not given"),
        (["--model.revision", "v9"], "model.revision: genmo/mochi-1-preview on the hub has no branch, tag or commit 'v9'"),
        (["--model.base", "nowhere"], "model.base: nowhere is neither a local folder nor a hub id"),
    ],
)
def test_what_the_hub_does_not_have_is_said_by_setting(hub: Hub, capsys, words: list[str], message: str) -> None:
    assert main(["download", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_local_folder_is_nothing_to_download(tiny: Path, capsys) -> None:
    assert main(["download", "--model.base", str(tiny)]) == 1
    assert "is a folder on this machine; there is nothing to download" in capsys.readouterr().err


def test_a_path_out_of_the_folder_is_refused(hub: Hub, monkeypatch, capsys) -> None:
    listing = hub.listing()
    listing["siblings"].append({"rfilename": "vae/../../evil.json", "size": 1, "blobId": "0" * 40})
    monkeypatch.setattr(Hub, "listing", lambda self: listing)
    assert main(["download"]) == 1
    assert "vae/../../evil.json" in capsys.readouterr().err


def test_the_processes_of_a_launch_wait_for_the_one_that_fetches(hub: Hub, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: locate(hub.base, None, "vae"), range(4)))
    assert found == {snapshot(tmp_path) / "vae"}
    assert hub.ranges_of(VAE) == [""]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_download_fetches_only_the_rest(hub: Hub, published: Path, tmp_path: Path, number: int, status: int) -> None:
    """A signal in the middle of a file that the server gives slowly; the program itself, as people run it."""
    size = (published / VAE).stat().st_size
    hub.breaks_after[VAE] = size // 2
    words = [sys.executable, "-m", "mochi_lora", "download"]
    place = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PATH": "", "HOME": str(tmp_path)}
    running = subprocess.Popen(words, env=place, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    blobs = tmp_path / "home" / "hub" / "models--genmo--mochi-1-preview" / "blobs"
    name = f"{hashlib.sha256((published / VAE).read_bytes()).hexdigest()}.incomplete"
    while not ((blobs / name).exists() and (blobs / name).stat().st_size) and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(number)
    assert running.wait() == status
    kept = (blobs / name).stat().st_size
    assert 0 < kept < size
    hub.breaks_after.clear()
    hub.asked.clear()
    assert subprocess.run(words, env=place, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1]).returncode == 0
    assert hub.ranges_of(VAE) == [f"bytes={kept}-"]
    assert (blobs.parent / "snapshots" / COMMIT / VAE).read_bytes() == (published / VAE).read_bytes()

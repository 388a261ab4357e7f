"""The doctor: what it finds, what it advises, and that nothing missing or broken makes it fall over."""

import importlib
import json
import os
import shutil
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_lora.cli import main
from mochi_lora.commands import doctor_machine
from mochi_lora.commands.doctor_machine import check_disk, check_gpu, check_kernels, check_packages, check_video
from mochi_lora.commands.doctor_model import check_model, check_wandb
from mochi_lora.config.load import load_config
from mochi_lora.errors import install_command
from mochi_lora.model.layout import FLOAT32_TENSORS

ROOT = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path: Path) -> None:
    """No model, no login, a small probe of the disk, folders that a test owns."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(check_disk, "__kwdefaults__", {"probe_bytes": 1 << 20})
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)


def run(capsys, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    """(exit status, finding by what it is about)."""
    status = main(["doctor", "--json", *words])
    return status, {item["what"]: item for item in json.loads(capsys.readouterr().out)}


def config_of(*overrides: str):
    return load_config(None, overrides)


def test_a_bare_machine_gets_a_line_and_advice_for_everything(capsys) -> None:
    status, found = run(capsys)
    assert status == 0
    assert {
        "torch",
        "host memory",
        "packages",
        "bitsandbytes",
        "flash-attn-4",
        "torchao",
        "av",
        "decord2",
        "wandb",
    } <= found.keys()
    assert found["model"]["status"] == "warn"
    assert "mochi-lora download" in found["model"]["advice"]
    assert all(item["advice"] for item in found.values() if item["status"] != "ok")


def test_people_read_a_table_and_the_next_command(capsys) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "packages" in told
    assert "warn  model: mochi-lora download fetches it (41 GB)" in told
    assert "next     mochi-lora download, then mochi-lora encode" in told


def test_a_whole_local_model_is_fine(tiny: Path, capsys) -> None:
    status, found = run(capsys, "--model.base", str(tiny))
    assert status == 0
    assert {found[part]["status"] for part in ("transformer", "vae", "text_encoder", "tokenizer")} == {"ok"}


@pytest.mark.parametrize(
    ("file", "what"),
    [
        (f"transformer/{WEIGHTS}", "transformer"),
        ("transformer/config.json", "transformer"),
        (f"vae/{WEIGHTS}", "vae"),
        ("text_encoder/model.safetensors", "text_encoder"),
        ("tokenizer/tokenizer.json", "tokenizer"),
    ],
)
def test_a_missing_file_is_bad_by_its_name_and_so_is_the_exit_status(tiny: Path, tmp_path: Path, capsys, file, what) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / file).unlink()
    status, found = run(capsys, "--model.base", str(model))
    assert status == 1
    assert [name for name, item in found.items() if item["status"] == "bad"] == [what]
    assert Path(file).name in found[what]["found"]


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:4], lambda content: b"\xff" * 40])
def test_a_file_that_was_cut_off_is_found_without_reading_it(tiny: Path, tmp_path: Path, damage) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    path = model / "vae" / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    bad = [item for item in check_model(config_of("--model.base", str(model))) if item.status == "bad"]
    assert [item.what for item in bad] == ["vae"]
    assert f"{WEIGHTS} cut off or damaged" in bad[0].found


def test_a_bf16_transformer_without_its_exact_tensors_is_told(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    folder = model / "transformer"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bf16.safetensors")
    (finding,) = [item for item in check_model(config_of("--model.base", str(model))) if item.what == "transformer"]
    assert (finding.status, FLOAT32_TENSORS in finding.advice) == ("warn", True)
    save_file({"pos_frequencies": tensors["pos_frequencies"].float()}, folder / FLOAT32_TENSORS)
    (finding,) = [item for item in check_model(config_of("--model.base", str(model))) if item.what == "transformer"]
    assert finding.status == "ok"


def test_a_disk_too_small_for_the_model_is_bad(capsys, monkeypatch) -> None:
    real = os.statvfs
    monkeypatch.setattr("os.statvfs", lambda path: os.statvfs_result((4096, 4096, 1000, 1000, 1000, *tuple(real(path))[5:])))
    status, found = run(capsys)
    assert status == 1
    (disk,) = [item for item in found.values() if item["what"].startswith("disk of model")]
    assert "41.0 GB needed" in disk["found"]


def test_a_folder_that_cannot_be_written_is_bad(tmp_path: Path, monkeypatch) -> None:
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_machine, "TemporaryFile", refuse)
    finding = check_disk("disk", tmp_path / "not" / "there", 0.0)
    assert (finding.status, "Permission denied" in finding.found) == ("bad", True)


def test_the_disk_is_left_as_it_was(tmp_path: Path) -> None:
    assert check_disk("disk", tmp_path / "deep" / "down", 0.0).status in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "status", "found"),
    [
        (["torch>=2.11", "rich>=15"], "ok", "2 of 2 as required"),
        (["torch>=99.1"], "bad", f"torch {torch.__version__} is not >=99.1"),
        (["av<19,>=18.1", "torch<2.11,>=2"], "bad", f"torch {torch.__version__} is not <2.11,>=2"),
        (["av<19,>=18.1"], "ok", "1 of 1"),
        (["no-such-package>=1"], "bad", "no-such-package is missing"),
        (['no-such-package>=1; extra == "test"'], "ok", "0 of 0"),
    ],
)
def test_packages_are_held_against_what_is_required(lines: list[str], status: str, found: str) -> None:
    finding = check_packages(lines)
    assert finding.status == status
    assert found in finding.found


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13"), OSError("undefined symbol"), RuntimeError("no kernel image")]
)
def test_an_optional_package_that_does_not_import_is_a_warning(monkeypatch, error: Exception) -> None:
    def fail(name):
        raise error

    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(importlib, "import_module", fail)
    assert {item.status for item in check_kernels()} == {"warn"}
    assert all(str(error) in item.found for item in check_kernels())
    assert {item.status for item in check_video()} == {"bad"}


class FakeGpu:
    """torch.cuda as the doctor asks it, of a GPU that is not here."""

    def __init__(self, monkeypatch, *, capability=(9, 0), free=140.0, total=141.0, memory_error=None) -> None:
        properties = types.SimpleNamespace(name="NVIDIA H200", major=capability[0], minor=capability[1])

        def memory(device):
            if memory_error:
                raise memory_error
            return int(free * 2**30), int(total * 2**30)

        ones = torch.ones
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
        monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(shape))


@pytest.mark.parametrize(("capability", "status"), [((9, 0), "warn"), ((10, 0), "warn"), ((8, 9), "ok"), ((12, 0), "ok")])
def test_flash4_is_missed_on_the_gpus_that_it_is_for(monkeypatch, capability, status: str) -> None:
    FakeGpu(monkeypatch, capability=capability)
    there = metadata.version

    def without(name: str) -> str:
        if name == "flash-attn-4":
            raise metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(metadata, "version", without)
    (finding,) = [item for item in check_kernels() if item.what == "flash-attn-4"]
    assert finding.status == status
    assert (install_command("flash4") in finding.advice) == (status == "warn")


def test_the_gain_that_the_doctor_names_is_the_measured_one() -> None:
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/train_step.jsonl").read_text().splitlines()]
    wanted = {"precision": "bf16", "checkpointing": "none", "compile": True}
    measured = {
        line["plan"]["attention"]: f"{line['step_seconds']['median']:.2f} s"
        for line in lines
        if "error" not in line and line["frames"] == 37 and wanted.items() <= line["plan"].items()
    }
    assert f"{measured['flash4']} with it and {measured['cudnn']} with cudnn" in doctor_machine._FLASH4_GAIN


@pytest.mark.parametrize(
    ("gpu", "status", "said"),
    [
        ({}, "ok", "compute 9.0: bf16, fp8, nf4, int8"),
        ({"capability": (8, 0), "total": 40.0, "free": 39.5}, "ok", "compute 8.0: bf16, nf4, int8"),
        ({"capability": (7, 5), "total": 16.0, "free": 15.5}, "warn", "compute 7.5: nf4, int8"),
        ({"free": 100.0}, "warn", "another process holds 41.0 GiB"),
        ({"total": 8.0, "free": 7.5}, "warn", "training wants 11 GiB free"),
        ({"memory_error": RuntimeError("CUDA error: no kernel image")}, "bad", "no kernel image"),
    ],
)
def test_a_gpu_is_described_with_what_it_can_do(monkeypatch, gpu, status: str, said: str) -> None:
    FakeGpu(monkeypatch, **gpu)
    (finding,) = check_gpu()
    assert finding.status == status
    assert said in f"{finding.found} | {finding.advice}"


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (dvs-builder)",
    ],
)
def test_a_driver_without_a_gpu_in_torch_is_bad(monkeypatch, tmp_path: Path, line: str) -> None:
    (tmp_path / "version").write_text(f"{line}\nGCC version: gcc version 12.3.0\n")
    monkeypatch.setattr(doctor_machine, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = check_gpu()
    assert finding.status == "bad"
    assert line.split("  ")[1] in finding.found
    assert "CUDA build" in finding.advice


@pytest.mark.parametrize(
    ("files", "environment", "words", "status", "said"),
    [
        ("", {}, [], "warn", "not logged in"),
        ("machine api.wandb.ai login user password secret", {}, [], "ok", "logged in by"),
        ("machine example.org login user password secret", {}, [], "warn", "not logged in"),
        ("machine", {}, [], "warn", "mend the file"),
        ("", {"WANDB_API_KEY": "secret"}, [], "ok", "logged in by WANDB_API_KEY"),
        ("", {"WANDB_MODE": "offline"}, [], "ok", "offline"),
        ("", {}, ["--tracking.wandb_mode", "offline"], "ok", "offline"),
        ("", {}, ["--tracking.trackers", "[]"], "ok", "not among tracking.trackers"),
    ],
)
def test_the_tracker_is_logged_in_where_it_is_wanted(tmp_path, monkeypatch, files, environment, words, status, said) -> None:
    (tmp_path / "netrc").write_text(files)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = check_wandb(config_of(*words))
    assert finding.status == status
    assert said in f"{finding.found} | {finding.advice}"
    assert "secret" not in f"{finding}"

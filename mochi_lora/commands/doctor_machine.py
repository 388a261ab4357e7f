"""What `mochi-lora doctor` finds of the machine: GPU, torch, memory, disks, packages, optional kernels."""

import importlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import torch
from packaging.requirements import Requirement

from mochi_lora.engine import flash4
from mochi_lora.engine.fp8 import supports_fp8
from mochi_lora.errors import install_command
from mochi_lora.planning.choice import host_memory

_GIB = 2**30
_SMALLEST_GPU = 11.0  # GiB free: the smallest cap that the engine has a plan for
_MOST_HOST_GIB = 24.0  # all 48 blocks in pinned memory take 19 GiB in bf16
_SHARED_GIB = 1.0  # torch's data loader hands batches over in /dev/shm; docker gives it 64 MiB
_SLOW_DISK = 150.0  # MB/s: 20 GB of weights take over two minutes
_PROBE_BYTES = 1 << 27
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED = Path("/dev/shm")  # noqa: S108 - measured, not written to
# Project name -> (name to import, what it is for).
_OPTIONAL = {
    "flash-attn-4": (flash4.INTERFACE, "engine.attention flash4"),
    "bitsandbytes": ("bitsandbytes", "int8 T5, nf4 and int8 base"),
    "torchao": ("torchao", "not used"),
}
# benchmarks/results/train_step.jsonl: one H200, bf16, 37 frames at 480x848, nothing checkpointed, compiled.
_FLASH4_GAIN = "a training step measured on an H200 took 0.88 s with it and 1.00 s with cudnn (bf16, 37 frames)"
_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)  # what a wheel of another CUDA or torch raises


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    status: Literal["ok", "warn", "bad"]
    what: str
    found: str
    advice: str = ""


def check_gpu() -> list[Finding]:
    """Each GPU with its memory, driver, and the precisions it has kernels for."""
    driver = _driver()
    if not torch.cuda.is_available():
        if driver:
            return [Finding("bad", "gpu", f"driver {driver}, but torch {torch.__version__} sees no GPU", _TORCH_ADVICE)]
        return [Finding("warn", "gpu", "none", "mochi-tiny runs on a CPU; the real model wants an NVIDIA GPU and its driver")]
    return [_gpu(index, driver) for index in _gpus()]


def _gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


_TORCH_ADVICE = "install torch's CUDA build for this driver (pytorch.org/get-started), or start the container with --gpus all"


def _driver() -> str:
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text(encoding="utf-8")) if _DRIVER.is_file() else None
    return match[1] if match else ""


def _gpu(index: int, driver: str) -> Finding:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    what = f"gpu {index}"
    try:
        free, total = (amount / _GIB for amount in torch.cuda.mem_get_info(device))
        sums = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        works = bool((sums == 64).all())
    except RuntimeError as error:  # an architecture that this build has no kernels for, a GPU that fell off the bus
        reason = str(error).splitlines()[0]
        return Finding("bad", what, f"{properties.name}: {reason}", f"{_TORCH_ADVICE}; if it persists, restart the machine")
    capability = f"{properties.major}.{properties.minor}"
    found = f"{properties.name}, {free:.1f} of {total:.1f} GiB free, driver {driver or 'unknown'}, compute {capability}"
    found += f": {', '.join(_precisions(device, properties.major))}"
    if not works:
        return Finding("bad", what, f"{found}; a product of ones came out wrong", "this GPU computes nonsense: take another")
    if properties.major < 8:
        return Finding("warn", what, found, "bf16 is emulated before compute 8.0 (Ampere), slowly; nobody has measured it")
    if free < _SMALLEST_GPU:
        return Finding("warn", what, found, f"training wants {_SMALLEST_GPU:.0f} GiB free; close what holds it (nvidia-smi)")
    if free < 0.9 * total:
        return Finding("warn", what, found, f"another process holds {total - free:.1f} GiB; see nvidia-smi")
    return Finding("ok", what, found)


def _precisions(device: torch.device, major: int) -> list[str]:
    return [name for name, has in (("bf16", major >= 8), ("fp8", supports_fp8(device)), ("nf4, int8", True)) if has]


def check_torch() -> Finding:
    """Which build of torch this is."""
    cuda = torch.version.cuda
    found = f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'CPU build'}, {torch.get_num_threads()} threads"
    return Finding("ok", "torch", found)


def check_memory() -> list[Finding]:
    """Free host memory, and the shared memory of the data loader's processes."""
    free = host_memory()
    advice = "" if free >= _MOST_HOST_GIB else f"swapping all blocks out wants {_MOST_HOST_GIB:.0f} GiB; a plan may swap fewer"
    findings = [Finding("warn" if advice else "ok", "host memory", f"{free:.1f} GiB free", advice)]
    if _SHARED.is_dir():
        size = os.statvfs(_SHARED)
        shared = size.f_bavail * size.f_frsize / _GIB
        small = "docker run --shm-size=8g, or set data.loader_workers to 0" if shared < _SHARED_GIB else ""
        findings.append(Finding("warn" if small else "ok", "shared memory", f"{shared:.2f} GiB free", small))
    return findings


def check_disk(what: str, folder: Path, needed_bytes: float, *, probe_bytes: int = _PROBE_BYTES) -> Finding:
    """Space and speed of the disk that `folder` is on (or will be); writes and deletes `probe_bytes` there."""
    there = existing(folder)
    try:
        free = os.statvfs(there).f_bavail * os.statvfs(there).f_frsize
        if free < needed_bytes:
            found = f"{there}: {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB needed"
            return Finding("bad", what, found, "free some space, or choose another disk (HF_HOME, data.cache, run.folder)")
        written, read = _speeds(there, probe_bytes)
    except OSError as error:
        return Finding("bad", what, f"{there}: {error.strerror}", "make it writable, or name another folder")
    found = f"{there}: {free / 1e9:.1f} GB free, writes {written:.0f} MB/s, reads {read:.0f} MB/s"
    slow = min(written, read) < _SLOW_DISK
    return Finding("warn" if slow else "ok", what, found, "a slow disk: loading weights takes minutes" if slow else "")


def existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    there = folder.absolute()
    while not there.is_dir():
        there = there.parent
    return there


def _speeds(folder: Path, count: int) -> tuple[float, float]:
    """(write, read) in MB/s; past the page cache where the file system lets go of it."""
    block = os.urandom(1 << 20)  # what does not compress
    with TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(count >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(1 << 20):
            pass
        read = time.perf_counter() - start
    return count / 1e6 / written, count / 1e6 / read


def check_packages(required: Sequence[str] | None = None) -> Finding:
    """What this package requires, by its own metadata: there, and of a version it takes."""
    try:
        asked = metadata.requires("mochi-lora") if required is None else required
    except metadata.PackageNotFoundError:
        return Finding("warn", "packages", "mochi-lora runs without being installed", install_command())
    wrong, right = [], 0
    for requirement in map(Requirement, asked or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        right += 1
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        return Finding("bad", "packages", "; ".join(wrong), install_command())
    versions = [f"{name} {metadata.version(name)}" for name in ("diffusers", "transformers", "peft")]
    return Finding("ok", "packages", f"{right} of {right} as required; {', '.join(versions)}")


def check_kernels() -> list[Finding]:
    """The optional packages: what is there, and whether it can be imported."""
    return [_optional(name, module, purpose) for name, (module, purpose) in _OPTIONAL.items()]


def _optional(name: str, module: str, purpose: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if module == flash4.INTERFACE and any(flash4.suits(torch.device("cuda", index)) for index in _gpus()):
            advice = f"{install_command('flash4')}; engine.attention auto takes it where it is the fastest"
            return Finding("warn", name, f"not installed; {_FLASH4_GAIN}", advice)
        return Finding("ok", name, f"not installed; optional ({purpose})")
    try:
        importlib.import_module(module)
    except _IMPORT_ERRORS as error:
        found = f"{version}, but import {module} fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return Finding("warn", name, found, f"install the build for torch {torch.__version__}, or remove it")
    cuda = "" if torch.cuda.is_available() else ", without a GPU"
    return Finding("ok", name, f"{version}{cuda} ({purpose})")


def check_video() -> list[Finding]:
    """The two libraries that read and write video; no ffmpeg program is needed."""
    return [_library("av", "av", _can_encode), _library("decord2", "decord", lambda: None)]


def _library(package: str, module: str, check: Callable[[], object]) -> Finding:
    try:
        version = importlib.import_module(module).__version__
        check()
    except (*_IMPORT_ERRORS, ValueError) as error:  # ValueError: PyAV has no such codec
        found = f"cannot be used: {str(error) or type(error).__name__}"
        return Finding("bad", package, found, f"pip install --force-reinstall {package}")
    return Finding("ok", package, str(version))


def _can_encode() -> None:
    import av  # noqa: PLC0415 - broken is a finding, not a crash

    av.Codec("libx264", "w")

"""`mochi-lora doctor`: is this machine fit for what the configuration asks, and if not, what is to be done."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mochi_lora.commands.doctor_machine import (
    Finding,
    check_disk,
    check_gpu,
    check_kernels,
    check_memory,
    check_packages,
    check_torch,
    check_video,
    existing,
)
from mochi_lora.commands.doctor_model import check_model, check_wandb, download_bytes
from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table
from mochi_lora.errors import UserError
from mochi_lora.model.places import cache_of


def run(config: Config, *, as_json: bool) -> None:
    """Print a line per finding, with what to do. Raises UserError if one of them is bad."""
    findings = list(_findings(config))
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        print_table("doctor", ("", "what", "found"), [(item.status, item.what, item.found) for item in findings])
        for item in findings:
            if item.advice:
                console.print(f"{item.status:4}  {item.what}: {item.advice}", markup=False, style=_STYLES[item.status])
    bad = [finding.what for finding in findings if finding.status == "bad"]
    if bad:
        raise UserError(f"{len(bad)} of {len(findings)} checks are bad: {', '.join(bad)}; what to do is said above")
    if not as_json:
        first = "mochi-lora download, then " if download_bytes(config) else ""
        console.print(f"next     {first}mochi-lora encode --config <your file>", markup=False)


_STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


def _findings(config: Config) -> Iterator[Finding]:
    yield from check_gpu()
    yield check_torch()
    yield from check_memory()
    yield from _disks(config)
    yield check_packages()
    yield from check_kernels()
    yield from check_video()
    yield from check_model(config)
    yield check_wandb(config)


def _disks(config: Config) -> Iterator[Finding]:
    """Each disk once, whatever lies on it."""
    local = Path(config.model.base)
    folders = {
        "model": local if local.is_dir() else cache_of(config.model.base),
        "cache": config.data.cache,
        "run": config.run.folder,
    }
    disks: dict[int, list[str]] = {}
    for name, folder in folders.items():
        disks.setdefault(existing(folder).stat().st_dev, []).append(name)
    for names in disks.values():
        needed = download_bytes(config) if "model" in names else 0.0
        yield check_disk(f"disk of {', '.join(names)}", folders[names[0]], needed)

"""`mochi-lora convert`: adapters between three layouts, the base model between two; each checked by reading it again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mochi_lora.console import console, progress_bar
from mochi_lora.errors import UserError
from mochi_lora.interop.adapter_formats import Format
from mochi_lora.interop.base_formats import to_diffusers, to_genmo
from mochi_lora.interop.conversion import convert
from mochi_lora.interop.factors import Difference
from mochi_lora.interop.quantised_base import to_fp8


def run_lora(source: Path, target: Path, *, to: Format, rank: int | None, assume_alpha_is_rank: bool) -> None:
    """Rewrite an adapter file in another layout and say how near it is. Raises UserError for what cannot be held."""
    require_free(target)
    done = convert(source, target, to, rank=rank, assume_alpha_is_rank=assume_alpha_is_rank)
    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    console.print(f"{done.source} -> {done.to}: {done.layers} linears, {ranks}: {target}", markup=False)
    print_error(done.error, exact=rank is None)


def run_base(sources: Sequence[Path], target: Path, *, to: Literal["diffusers", "genmo", "fp8"]) -> None:
    """Convert Genmo's files to a diffusers folder, or back, or either to fp8. Raises UserError for what is not whole."""
    if to != "diffusers" and len(sources) > 1:
        one = "folder at a time, transformer or vae" if to == "genmo" else "transformer at a time, folder or file"
        raise UserError(f"--to {to} takes one {one}; got {', '.join(map(str, sources))}")
    with progress_bar() as bar:
        task = bar.add_task("tensors written and read again", total=None)

        def tick() -> None:
            bar.advance(task)

        if to == "diffusers":
            done = to_diffusers(sources, target, tick)
        else:
            done = (to_genmo if to == "genmo" else to_fp8)(sources[0], target, tick)
    for path in done.paths:
        console.print(f"{done.component}: {path}", markup=False)
    console.print(f"checked: {done.tensors} tensors read back bit for bit")
    if to != "genmo":
        console.print(f"next: put it beside the other components as MODEL/{done.component}, and point model.base at MODEL")


def print_error(error: Difference, *, exact: bool) -> None:
    """The difference as measured on the file, in one line."""
    layer, worst = error.worst
    count = len(error.by_layer)
    if exact:
        told = f"checked: delta W of all {count} linears read back equal; the largest relative difference is {worst:.1e}"
    else:
        told = f"checked: delta W of {count} linears is {error.total:.2%} off in all, at most {worst:.2%} ({layer})"
    console.print(told, markup=False)


def require_free(target: Path) -> None:
    """Raises UserError where something is already called `target`."""
    if target.exists():
        raise UserError(f"{target}: exists; give a new file name, or delete it")

"""One adapter file to another layout, and the proof: what was written is read again and compared, delta W by delta W."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mochi_lora.errors import DamagedFileError
from mochi_lora.interop.adapter_formats import Format, read_stored, stored_factors, write_stored
from mochi_lora.interop.factors import Difference, Factors, difference

TOLERANCE = 1e-6  # relative, of one delta W: float32 factors


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; `error` is nought but for rounding unless a rank was asked for."""

    source: Format
    to: Format
    layers: int
    ranks: tuple[int, int]  # lowest and highest in the file written, in diffusers modules
    error: Difference


def convert(
    source: Path, target: Path, to: Format, *, rank: int | None = None, assume_alpha_is_rank: bool = False
) -> Conversion:
    """Rewrite `source` as `target` in layout `to`, exactly, or by SVD at most of `rank` per linear.

    Raises UserError where the layout cannot hold the adapter, and DamagedFileError where the file does not read back as
    what was meant.
    """
    stored = read_stored(source, assume_alpha_is_rank=assume_alpha_is_rank)
    before = stored_factors(stored)
    history = {"converted_from": {"file": source.name, "format": stored.format}}
    error = write_checked(target, before, to, {**stored.provenance, **history}, rank=rank)
    after = stored_factors(read_stored(target))
    ranks = [part.rank for part in after.values()]
    return Conversion(stored.format, to, len(before), (min(ranks), max(ranks)), error)


def write_checked(
    target: Path, factors: dict[str, Factors], to: Format, provenance: dict[str, Any], *, rank: int | None = None
) -> Difference:
    """`write_stored`, then read the file again; returns its measured difference from `factors`."""
    meant = write_stored(target, factors, to, provenance, rank=rank)
    found = stored_factors(read_stored(target))
    layer, worst = difference(meant, found).worst
    if not worst <= TOLERANCE:
        target.unlink()
        raise DamagedFileError(f"{target}: {layer} reads back {worst:.1e} off what was written; the file has been deleted")
    error = difference(factors, found)
    layer, worst = error.worst
    if rank is None and not worst <= TOLERANCE:
        target.unlink()
        raise DamagedFileError(f"{target}: delta W of {layer} is {worst:.1e} off the original; the file has been deleted")
    return error

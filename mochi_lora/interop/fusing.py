"""Factors of diffusers' separate projections as factors of Genmo's fused linears, and back. Both ways are exact.

q, k and v of one fused linear have one A in Genmo's format. Where ours differ they are stacked: A holds all of them, B is
block-diagonal, and the rank is the sum. On the way home each projection keeps only the terms that are not zero for it.
"""

import re

import torch

from mochi_lora.errors import UserError
from mochi_lora.interop.factors import Factors, listed, trimmed
from mochi_lora.model import keymap

_BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d+)\.")


def fuse(factors: dict[str, Factors], source: str) -> dict[str, Factors]:
    """Diffusers module -> factors, as Genmo module -> factors. Raises UserError for a module that Genmo's model has not."""
    modules: dict[str, dict[str, Factors]] = {}
    unknown = []
    for name, part in factors.items():
        try:
            modules.setdefault(keymap.module_of(name), {})[name] = part
        except KeyError:
            unknown.append(name)
    if unknown:
        raise UserError(f"{source}: {len(unknown)} modules are not of Mochi's transformer:\n{listed(sorted(unknown))}")
    return {module: _fuse_one(module, parts, source) for module, parts in sorted(modules.items())}


def _fuse_one(module: str, parts: dict[str, Factors], source: str) -> Factors:
    depth = 0  # no block is the last: only `mod_y` has another name there, and it is taken as it comes
    rows = keymap.rows_of(module, depth)
    present = list(parts.values())
    if len(rows.names) == 1:
        return Factors(present[0].a, rows.join([present[0].b]))
    shapes = sorted({(part.b.shape[0], part.a.shape[1]) for part in present})
    if len(shapes) > 1:
        told = " and ".join(f"{rows} x {columns}" for rows, columns in reversed(shapes))
        raise UserError(f"{source}: the projections of {module} (q, k, v) must have one shape, got {told}")
    height = shapes[0][0]
    if all(torch.equal(part.a, present[0].a) for part in present):
        zero = torch.zeros(height, present[0].rank)
        return Factors(present[0].a, rows.join([parts[name].b if name in parts else zero for name in rows.names]))
    total, start = sum(part.rank for part in present), 0
    stacked = []
    for name in rows.names:
        b = torch.zeros(height, total)
        if name in parts:
            b[:, start : start + parts[name].rank] = parts[name].b
            start += parts[name].rank
        stacked.append(b)
    ordered = [parts[name].a for name in rows.names if name in parts]
    return Factors(torch.cat(ordered), rows.join(stacked))


def split(modules: dict[str, Factors], source: str) -> dict[str, Factors]:
    """Genmo module -> factors, as diffusers module -> factors, padding removed.

    A projection whose delta is zero throughout is left out, unless there is no other. Raises UserError for unknown modules.
    """
    blocks = [int(match[1]) for module in modules if (match := _BLOCK.match(module))]
    depth = 1 + max(blocks, default=-1)
    found: dict[str, Factors] = {}
    unknown = []
    for module, part in modules.items():
        # In the last block `mod_y` only scales, so it is narrower than its input; elsewhere the block cannot be the last.
        inner = module.endswith(".mod_y") and part.b.shape[0] > part.a.shape[1]
        try:
            rows = keymap.rows_of(module, depth + inner)
        except KeyError:
            unknown.append(module)
            continue
        pieces = 2 if rows.swap_halves else len(rows.names)
        if part.b.shape[0] % pieces:
            raise UserError(f"{source}: {module} has {part.b.shape[0]} output rows, which cannot be cut in {pieces}")
        parts = keymap.lora_to_diffusers(module, part.a, part.b, depth + inner)
        found |= {name: Factors(a.clone(), b.contiguous()) for name, (a, b) in parts.items()}  # no two share memory in a file
    if unknown:
        raise UserError(f"{source}: {len(unknown)} modules are not of Mochi's transformer:\n{listed(sorted(unknown))}")
    kept = {name: small for name, part in found.items() if (small := trimmed(part)).rank}
    return kept or found

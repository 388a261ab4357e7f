"""Several adapters as one: ranks side by side, which is exact. The best lower rank of the sum is `truncation`'s."""

from collections.abc import Sequence

import torch

from mochi_lora.errors import UserError
from mochi_lora.interop.factors import Factors, is_nothing


def merge(parts: Sequence[tuple[dict[str, Factors], float]]) -> dict[str, Factors]:
    """The weighted sum of adapters: delta W = sum of w_i B_i A_i, of rank sum r_i. A weight of 0 leaves an adapter out.

    Raises UserError where two adapters have the same linear in different shapes (they are of different models), and where
    nothing is left of the sum.
    """
    terms: dict[str, list[Factors]] = {}
    for factors, weight in parts:
        if weight == 0:
            continue
        for name, part in factors.items():
            terms.setdefault(name, []).append(Factors(part.a, part.b * weight))
    for name, found in terms.items():
        shapes = {(part.b.shape[0], part.a.shape[1]) for part in found}
        if len(shapes) > 1:
            told = " and ".join(f"{rows} x {columns}" for rows, columns in sorted(shapes))
            raise UserError(f"{name} is {told} in the adapters to merge; they were made for different models")
    merged = {name: _side_by_side(found) for name, found in terms.items()}
    if merged and all(map(is_nothing, merged.values())):
        message = f"nothing is left of the sum: delta W is zero, but for rounding, in all {len(merged)} linears"
        raise UserError(f"{message}; the adapters cancel out or hold no training: change the weights, or the files")
    return merged


def _side_by_side(terms: list[Factors]) -> Factors:
    return Factors(torch.cat([part.a for part in terms]), torch.cat([part.b for part in terms], dim=1))

"""Several adapters as one: ranks side by side, which is exact. The best lower rank of the sum is `truncation`'s."""

from collections.abc import Sequence

import torch

from mochi_lora.errors import UserError
from mochi_lora.interop.factors import Factors


def merge(parts: Sequence[tuple[dict[str, Factors], float]]) -> dict[str, Factors]:
    """The weighted sum of adapters: delta W = sum of w_i B_i A_i, of rank sum r_i. A weight of 0 leaves an adapter out.

    Raises UserError where two adapters have the same linear in different shapes: they are of different models.
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
    return {name: _side_by_side(found) for name, found in terms.items()}


def _side_by_side(terms: list[Factors]) -> Factors:
    return Factors(torch.cat([part.a for part in terms]), torch.cat([part.b for part in terms], dim=1))

"""The best adapter of a lower rank: singular value decomposition of delta W, without forming it.

Eckart & Young 1936: no other matrix of that rank is nearer. sqrt(S) goes to either factor, so that both train alike.
"""

import torch

from mochi_lora.interop.factors import Factors


def truncate(part: Factors, rank: int) -> Factors:
    """`part` at most of `rank`; as it is where its rank is no higher. Costs O((in + out) rank^2)."""
    assert rank > 0, f"a rank is positive, got {rank}"
    if part.rank <= rank:
        return part
    left, core_b = torch.linalg.qr(part.b.double())
    right, core_a = torch.linalg.qr(part.a.double().T)
    u, s, vt = torch.linalg.svd(core_b @ core_a.T)
    root = s[:rank].sqrt()
    a, b = root[:, None] * vt[:rank] @ right.T, left @ u[:, :rank] * root
    # Outputs that nothing reaches stay at nought: rounding would make adapted projections of them when a fusion is split.
    b[~part.b.any(dim=1)] = 0
    return Factors(a.float(), b.float())


def truncate_all(factors: dict[str, Factors], rank: int) -> dict[str, Factors]:
    """`truncate` for every linear."""
    return {name: truncate(part, rank) for name, part in factors.items()}

"""What the GPU can do: rates for predictions, from a table of cards (`cards.yaml`), and what an hour of it costs."""

import difflib
import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, get_args

import torch
import yaml

from mochi_lora.engine import flash4
from mochi_lora.engine.fp8 import FP8_FROM
from mochi_lora.engine.kernels import HALF_ONLY, Attention
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import Precision, lacking, precisions_of
from mochi_lora.errors import UserError

_GIB = 2**30
# Flash attention's share of the bf16 peak, forward and backward, on cards nobody measured (FlashAttention-2's own tables for an
# A100 say 0.5 to 0.7).
_ATTENTION_SHARE = (0.6, 0.5)
_EFFICIENT_SHARE = (0.49, 0.40)  # of flash's rates: the memory-efficient kernel's on an H200, forward and backward
_RANGE = (0.8, 1.5)  # of a time estimated from a datasheet
_TIMED: tuple[Precision, ...] = ("bf16", "fp8")  # steps at full size; those of the others are arithmetic on every card
# Of what NVLink or InfiniBand carries, what collectives reach: 370 of 450 GB/s, says NCCL's author (NVIDIA/nccl-tests#212).
_LINK_SHARE = 0.82
_ETHERNET = 1.25  # GB/s between hosts of cards whose network is not known: 10 Gbit/s
Rates = tuple[tuple[int, float, float], ...]  # (tokens, TFLOP/s forward, backward), rising


@dataclass(frozen=True)
class Card:
    """Achieved rates: TFLOP/s of products, GB/s of the memory, of the bus, and to other GPUs, each way."""

    name: str
    capability: float
    memory_gib: float
    products: dict[str, float]  # by precision of the factors: bf16, fp8
    bandwidth: float
    host: float
    link: float  # of the same host
    network: float  # of other hosts, this GPU's share
    attention: dict[Attention, Rates]
    source: str | None  # of its own measurements; None: an estimate from its datasheet
    lacks: frozenset[Precision] = frozenset()  # in this machine: no kernels are installed for them

    @property
    def generation(self) -> tuple[int, int]:
        """Compute capability as torch tells it."""
        major, minor = divmod(round(10 * self.capability), 10)
        return major, minor

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Base precisions for `auto` that it has kernels for, the exact one first."""
        every: tuple[Precision, ...] = ("bf16", "fp8", "nf4", "int8")
        return tuple(one for one in every if one not in self.lacks and (one != "fp8" or self.generation >= FP8_FROM))

    def require(self, precision: Precision, attention: Attention) -> None:
        """Raises UserError where it has no kernel for one of the two, or none for both together."""
        runs = tuple(one for one in get_args(Precision) if one == "fp32" or one in self.precisions)
        if precision not in runs:
            raise lacking(precision, runs, self.name)
        if attention == "flash4" and (why := flash4.other_generation(*self.generation)):
            raise UserError(f"engine.attention: {why}; set it to auto")
        if precision == "fp32" and attention in HALF_ONLY:
            message = f"engine.attention: {attention} takes no float32, which engine.precision asks for"
            raise UserError(f"{message}; set it to auto, efficient or math")

    def spread(self, plan: Plan) -> tuple[float, float]:
        """Factors around a predicted time; 1 and 1 where such a plan was measured."""
        measured = self.source is not None and plan.precision in _TIMED and plan.attention in self.attention
        return (1.0, 1.0) if measured else _RANGE

    def told(self, predicted: float, plan: Plan, form: str = ".2f") -> str:
        """A predicted time, or what follows from one, for people: a range where nobody measured this plan on this card."""
        low, high = self.spread(plan)
        return f"{predicted:{form}}" if low == high else f"{low * predicted:{form}} to {high * predicted:{form}}"

    def fastest_attention(self, precision: Precision) -> Attention:
        """The kernel that needs nothing installed and is the fastest at the shortest length known."""
        without = HALF_ONLY if precision == "fp32" else {"flash4"}
        return max(self.attention.keys() - without, key=lambda name: sum(self.attention[name][0][1:]))

    def attention_rates(self, kernel: Attention, tokens: int) -> tuple[float, float]:
        """TFLOP/s (forward, backward) at this length, between its neighbours in the table. Flash's for a kernel unknown."""
        rates = self.attention.get(kernel) or self.attention["flash"]
        right = bisect_left(rates, (tokens,))
        if right in (0, len(rates)):
            return rates[min(right, len(rates) - 1)][1:]
        (x0, *below), (x1, *above) = rates[right - 1], rates[right]
        share = (tokens - x0) / (x1 - x0)
        forward, backward = (low + share * (high - low) for low, high in zip(below, above, strict=True))
        return forward, backward


@cache
def cards() -> tuple[Card, ...]:
    """The table, in its order."""
    rows = _table("cards.yaml")
    reference = next(row for row in rows if "measured" in row)
    return tuple(_card(row, reference) for row in rows)


def card_named(name: str) -> Card:
    """Raises UserError with what there is."""
    wanted = _plain(name)
    found = [card for card in cards() if wanted in _plain(card.name)]
    exact = [card for card in found if wanted == _plain(card.name)]
    if len(exact or found) == 1:
        return (exact or found)[0]
    near = [card.name for card in found] or difflib.get_close_matches(name, [card.name for card in cards()], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    message = f"--gpu {name}: expected one of {', '.join(card.name for card in cards())}{hint}"
    raise UserError(f"{message} For another card give --memory, or run this on it")


def card_nearest(gib: float) -> Card:
    """The card of the table whose memory is nearest."""
    return min(cards(), key=lambda card: abs(card.memory_gib - gib))


def card_of(device: torch.device) -> Card:
    """The card in this machine: from the table, or for a stranger from a moment's measurement."""
    name = torch.cuda.get_device_name(device)
    rows = zip(_table("cards.yaml"), cards(), strict=True)
    card = next((card for row, card in rows if re.search(row["device"], name)), None) or _measured_here(device, name)
    return replace(card, lacks=frozenset(card.precisions).difference(precisions_of(device)))


def price_of(card: Card) -> tuple[float, str] | None:
    """(dollars per hour, where and when that was read), or None where the table has none."""
    row = _table("prices.yaml").get(card.name)
    return (float(row["usd"]), f"{row['source']}, {row['date']}") if row else None


def _table(name: str) -> Any:  # noqa: ANN401 - YAML is any
    return yaml.safe_load(files("mochi_lora.planning").joinpath(name).read_text(encoding="utf-8"))


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\W_]", "", name.lower())


def _card(row: dict[str, Any], reference: dict[str, Any]) -> Card:
    """A row with the rates it was measured at, or with the reference's shares of its own peaks."""
    own, peak = row.get("measured"), row["peak"]
    known, best = reference["measured"], reference["peak"]
    rates = own or {kind: peak[kind] * known[kind] / best[kind] for kind in ("bf16", "fp8", "bandwidth") if kind in peak}
    if own:
        attention: dict[Attention, Rates] = {
            kernel: tuple((int(s), float(f), float(b)) for s, f, b in lines) for kernel, lines in own["attention"].items()
        }
    else:
        attention = _estimated_attention(peak["bf16"])
    return Card(
        name=row["name"],
        capability=row["capability"],
        memory_gib=row["memory_gib"],
        products={kind: rates[kind] for kind in ("bf16", "fp8") if kind in rates},
        bandwidth=rates["bandwidth"],
        host=peak["host"],
        link=_LINK_SHARE * peak["link"] if "link" in peak else peak["host"],
        network=_LINK_SHARE * peak.get("network", _ETHERNET),
        attention=attention,
        source=own["source"] if own else None,
    )


@cache
def _measured_here(device: torch.device, name: str) -> Card:
    """A card that is not in the table: one bf16 product and two copies are timed, the rest goes by the usual shares.

    Once: a second measurement would give other rates, and a pick and what is said of it would be of two cards.
    """
    left = torch.randn(8192, 3072, device=device, dtype=torch.bfloat16)
    right = torch.randn(3072, 8192, device=device, dtype=torch.bfloat16)
    big, twin = (torch.empty(2**28, device=device, dtype=torch.uint8) for _ in range(2))
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    bf16 = 2 * 8192 * 3072 * 8192 / _seconds(lambda: left @ right) / 1e12
    bandwidth = 2 * 2**28 / _seconds(lambda: twin.copy_(big)) / 1e9
    host = 2**28 / _seconds(lambda: big.copy_(pinned, non_blocking=True)) / 1e9
    major, minor = torch.cuda.get_device_capability(device)
    return Card(
        name=name,
        capability=major + minor / 10,
        memory_gib=torch.cuda.get_device_properties(device).total_memory / _GIB,
        products={"bf16": bf16, "fp8": 1.8 * bf16},
        bandwidth=bandwidth,
        host=host,
        link=host,
        network=_LINK_SHARE * _ETHERNET,
        attention=_estimated_attention(bf16),
        source=None,
    )


def _estimated_attention(bf16: float) -> dict[Attention, Rates]:
    """By the usual shares of the rate of bf16 products."""
    forward, backward = (share * bf16 for share in _ATTENTION_SHARE)
    efficient = (1, _EFFICIENT_SHARE[0] * forward, _EFFICIENT_SHARE[1] * backward)
    return {"flash": ((1, forward, backward),), "efficient": (efficient,)}


def _seconds(work: Any, times: int = 10) -> float:  # noqa: ANN401 - a callable whose result is dropped
    """Device seconds of one call."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times

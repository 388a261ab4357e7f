"""What `mochi-lora prepare` prints of footage and limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mochi_lora.config.curation import SplitConfig
from mochi_lora.console import print_table
from mochi_lora.curation.filters import Distribution
from mochi_lora.curation.spent import Spent
from mochi_lora.curation.split import Became


@dataclass(frozen=True)
class Source:
    """One video: why it is refused, if it is, and what became of it, if it could be read."""

    path: Path
    refused: str | None
    became: Became | None = None
    clips: int = 0

    def to_row(self) -> dict[str, Any]:
        """For footage.jsonl."""
        row: dict[str, Any] = {"source": str(self.path)}
        if self.became is not None:
            row |= {"seconds": round(self.became.seconds, 3), "shots": self.became.shots, "clips": self.clips}
            row |= {"seconds_in_clips": round(self.became.spent.clips, 3), "seconds_lost": self.became.spent.lost()}
        return row if self.refused is None else row | {"refused": self.refused}


def print_footage(sources: Sequence[Source], split: SplitConfig, again: int, passed_over: Mapping[str, int]) -> None:
    """Counts, where the seconds went, and who is refused. `again` of the surveys are an earlier run's."""
    used = [source.became for source in sources if source.became is not None and source.refused is None]
    unused = [source.became for source in sources if source.became is not None and source.refused is not None]
    spent = sum((became.spent for became in used), Spent())
    refused = [source for source in sources if source.refused is not None]
    told_of_unused = f"{sum(became.seconds for became in unused):.1f} s of those that can be read" if unused else ""
    rows = [
        ("videos", len(used), f"{sum(became.seconds for became in used):.1f} s"),
        ("shots", sum(became.shots for became in used), ""),
        ("clips", sum(source.clips for source in sources), f"{spent.clips:.1f} s, {split.mode}, {split.frames} frames each"),
        ("in no clip: fades, black", "", f"{spent.fades:.1f} s"),
        ("in no clip: margins", "", f"{spent.margins:.1f} s, split.margin"),
        ("in no clip: short shots", sum(became.short_shots for became in used), f"{spent.short_shots:.1f} s, split.frames"),
        ("in no clip: rest of shots", "", f"{spent.rest_of_shots:.1f} s, split.mode"),
        ("videos refused", len(refused), told_of_unused),
        ("surveyed by an earlier run", again, ""),
    ]
    if passed_over:
        told = " ".join(f"{count} {suffix}" for suffix, count in passed_over.items())
        rows.append(("files not looked at", sum(passed_over.values()), f"{told}: no videos by their names"))
    print_table("footage", ("", "count", ""), rows)
    if refused:
        print_table("refused", ("video", "reason"), [(source.path, source.refused) for source in refused])


def print_distributions(seen: Sequence[Distribution]) -> None:
    """Each limit beside what it was cut from."""
    header = ("filter.", "limit", "refuses", "least", "5 %", "median", "95 %", "most", "from least to most; | is the limit")
    parts = ("0", "5", "50", "95", "100")
    rows = [
        (
            one.setting,
            "off" if one.threshold is None else f"{one.threshold:g}",
            f"{one.refused} of {one.clips}",
            *(f"{one.percentiles[part]:.3g}" for part in parts),
            one.picture,
        )
        for one in seen
    ]
    print_table("what the limits are cut from", header, rows)

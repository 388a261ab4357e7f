"""`report.md`: the page without pictures, for a terminal, a pull request or a model card."""

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from mochi_lora.evaluation.results import Comparison, Evaluation, file_name
from mochi_lora.files import write_text
from mochi_lora.measures.catalogue import MEASURES
from mochi_lora.report import findings
from mochi_lora.report.wording import (
    SET_TITLES,
    UNADJUSTED,
    conclusion,
    decimals,
    direction,
    evidence,
    gaps,
    label,
    number,
    outcome,
    percent,
    primaries,
    substitutes,
)

NAME = "report.md"
_NEAREST = 6


def write_markdown(folder: Path, evaluation: Evaluation) -> Path:
    """Write `folder`/report.md (quick-report.md), atomically; videos are links relative to it."""
    parts = (
        _verdict,
        _questions,
        _leaks,
        _truth,
        _strengths,
        _checkpoints,
        _losses,
        _copies,
        _measures,
        _videos,
        _gaps,
        _making,
    )
    text = "\n\n".join("\n".join(lines) for part in parts if (lines := part(evaluation)))
    path = folder / file_name(NAME, quick=evaluation.quick)
    write_text(path, text + "\n")
    return path


def plain(text: str) -> str:
    """`text` so that Markdown shows it as it is, on one line and inside a table's cell."""
    flat = re.sub(r"\s+", " ", text).strip()
    marked = re.sub(r"([\\`*_{}\[\]|~])", r"\\\1", flat).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([#+=-]|\d+[.)])", r"\\\1", marked)


def code(text: str) -> str:
    """`text` as inline code, whatever backticks and line ends it has."""
    flat = re.sub(r"\s+", " ", text).strip()
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    pad = " " if "`" in flat else ""
    return f"{fence}{pad}{flat}{pad}{fence}".replace("|", r"\|")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(header)
    return ["", *(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows))]


def _verdict(it: Evaluation) -> list[str]:
    lines = [f"# {plain(it.title)}", "", f"**Verdict: {outcome(it)[0]}.** {plain(it.verdict.headline)}", ""]
    lines += [f"- {plain(reason)}" for reason in it.verdict.reasons]
    if it.verdict.advice:
        lines += ["", "## What to try next", ""]
        lines += [f"{index}. {plain(step)}" for index, step in enumerate(it.verdict.advice, 1)]
    if it.quick:
        lines += ["", "> Indicative, nothing was tested: few prompts, one seed each."]
    if it.incomparable:
        lines += [
            "",
            f"> Not comparable with other people's numbers: {substitutes(it)}. Small built-in networks measured these.",
        ]
    return lines


def _row(row: Comparison) -> list[str]:
    places = decimals(row)
    low, high = (number(end, places, signed=True) for end in (row.difference.low, row.difference.high))
    difference = f"{number(row.difference.value, places, signed=True)} ({low} to {high})"
    return [number(row.base, places), number(row.adapter, places), difference, f"{conclusion(row)[0]}. {evidence(row)}"]


def _questions(it: Evaluation) -> list[str]:
    rows = []
    for _, question, row, lacking in primaries(it):
        if row:
            rows.append([f"{question} ({label(row.measure)}, {direction(row.measure)})", *_row(row)])
        else:
            reasons = "; ".join(f"{what}, because {plain(because)}" for what, because in gaps(lacking))
            rows.append([question, "", "", "", f"Not measured{': ' + reasons if reasons else ''}."])
    header = ("Question", "Base", "Adapter", "Difference (95 % interval)", "Conclusion")
    more = [f"{findings.distance_finding(it.distance)}."] if it.distance else []
    if it.strength_zero_is_base is not None:
        more.append(f"{findings.strength_zero_finding(is_base=it.strength_zero_is_base)}.")
    return ["## Three questions", *_table(header, rows), *(line for text in more for line in ("", plain(text)))]


def _leaks(it: Evaluation) -> list[str]:
    if not it.bleed:
        return []
    lines = ["## Does the style come unasked?", ""]
    for leak in it.bleed:
        interval = f"95 % interval {percent(leak.ratio.low)} to {percent(leak.ratio.high)}"
        lines.append(f"- {findings.bleed_finding(leak)} ({interval}; 100 % is as much as with the trigger word).")
    return lines


def _truth(it: Evaluation) -> list[str]:
    rows = [
        [plain(what), number(base, 2), number(adapter, 2), number(adapter - base, 2, signed=True)]
        for what, (base, adapter) in it.truth.items()
    ]
    header = ("What", "Base", "Adapter", "Change")
    return ["## Checked against the drawn world", *_table(header, rows)] if rows else []


def _strengths(it: Evaluation) -> list[str]:
    if not it.sweep or not it.sweep.points:
        return []
    names = [name for name in MEASURES if any(name in point.values for point in it.sweep.points)]
    rows = [[f"{point.strength:g}", *(number(point.values.get(name)) for name in names)] for point in it.sweep.points]
    grids = ["", "Side by side: " + ", ".join(f"[{plain(name)}]({quote(name)})" for name in it.grids)] if it.grids else []
    return [f"## {findings.sweep_finding(it.sweep)}", *_table(("Strength", *map(label, names)), rows), *grids]


def _checkpoints(it: Evaluation) -> list[str]:
    if not it.curve or not it.curve.points:
        return []
    names = [name for name in MEASURES if any(name in point.values for point in it.curve.points)]
    rows = [
        [
            f"**{point.step}**" if point.adapter == it.curve.recommended else str(point.step),
            *(number(point.values.get(name)) for name in names),
            number(point.held_out_loss),
            "no worse than the base" if point.admissible else "worse than the base",
        ]
        for point in it.curve.points
    ]
    lines = [f"## {findings.curve_finding(it.curve)}", "", plain(it.curve.because)]
    if it.curve.recommended:
        lines += ["", f"The file to keep: {code(it.curve.recommended)}"]
    return lines + _table(("Step", *map(label, names), "Held-out loss", "Quality and alignment"), rows)


def _losses(it: Evaluation) -> list[str]:
    rows = [
        [f"{row.sigma:g}"]
        + [
            f"{number(part.value)} ({number(part.low)} to {number(part.high)})"
            for part in (row.base_held_out, row.adapter_held_out, row.base_training, row.adapter_training)
        ]
        for row in it.losses
    ]
    header = ("Noise level", "Base, clips never seen", "Adapter, clips never seen", "Base, training", "Adapter, training")
    return [f"## {findings.losses_finding(it.losses)}", *_table(header, rows)] if rows else []


def _copies(it: Evaluation) -> list[str]:
    found = it.memorisation
    if found is None:
        return []
    rows = [
        [plain(row.prompt), code(row.training_clip), number(row.similarity, 2), "flagged" if row.flagged else ""]
        for row in found.nearest[:_NEAREST]
    ]
    lines = [
        f"## {findings.memorisation_finding(found)}",
        "",
        f"{plain(found.scope)} Flagged above {number(found.threshold, 2)}. {plain(found.calibration)}",
    ]
    return lines + (_table(("Prompt", "Nearest training clip", "Similarity", ""), rows) if rows else [])


def _measures(it: Evaluation) -> list[str]:
    rows = [
        [SET_TITLES[row.prompt_set], f"{label(row.measure)} ({direction(row.measure)})", *_row(row)] for row in it.comparisons
    ]
    header = ("Prompts", "Measure", "Base", "Adapter", "Difference (95 % interval)", "Conclusion")
    note = ["", UNADJUSTED] if any(row.p_value is not None for row in it.comparisons) else []
    return ["## All measures", *_table(header, rows), *note] if rows else []


def _videos(it: Evaluation) -> list[str]:
    rows = [
        [plain(pair.prompt), str(pair.seed), f"[base]({quote(pair.base_video)})", f"[adapter]({quote(pair.adapter_video)})"]
        for pair in it.pairs
    ]
    return ["## Videos", *_table(("Prompt", "Seed", "Base", "Adapter"), rows)] if rows else []


def _gaps(it: Evaluation) -> list[str]:
    rows = [f"- {plain(what)}, because {plain(because)}." for what, because in gaps(it.missing)]
    return ["## What was not computed", "", *rows] if rows else []


def _making(it: Evaluation) -> list[str]:
    rows = [["base model", code(it.base_model)], ["adapter", code(it.adapter)]]
    rows += [[plain(name), code(value)] for name, value in (*it.settings.items(), *it.backbones.items())]
    return ["## How this was made", *_table(("Setting", "Value"), rows)]

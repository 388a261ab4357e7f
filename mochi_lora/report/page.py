"""`report.html`: one file that needs nothing else, neither a network nor the folder it lies in."""

from functools import cache
from pathlib import Path
from typing import get_args

from jinja2 import Environment

from mochi_lora.evaluation.results import Comparison, Evaluation, PromptSet, file_name
from mochi_lora.files import write_text
from mochi_lora.measures.catalogue import MEASURES
from mochi_lora.report import findings, wording
from mochi_lora.report.panels import curve_panels, loss_panels, sweep_panels
from mochi_lora.report.pictures import MOST_BYTES, MOST_PAIRS, Shown, embed, embed_picture
from mochi_lora.report.plots import interval_bar
from mochi_lora.report.templating import own_script, page_environment

NAME = "report.html"
_NEAREST = 6  # neighbours with pictures


def write_page(folder: Path, evaluation: Evaluation, *, most_pairs: int = MOST_PAIRS, most_bytes: int = MOST_BYTES) -> Path:
    """Write `folder`/report.html (quick-report.html), atomically; videos are read from `folder`.

    At most `most_pairs` pairs and `most_bytes` of their videos go into the page, the rest are links relative to it. Raises
    UserError when a video or picture that the evaluation names is not there.
    """
    shown = embed(folder, evaluation.pairs, most_pairs=most_pairs, most_bytes=most_bytes)
    text = (
        _environment()
        .get_template("page.html")
        .render(
            it=evaluation,
            **own_script("page.js"),
            outcome=wording.outcome(evaluation),
            primaries=wording.primaries(evaluation),
            sections=_by_set(shown),
            embedded=sum(bool(pair.base.video) for pair in shown),
            others=_others(evaluation),
            tested=any(row.p_value is not None for row in evaluation.comparisons),
            neighbours=_neighbours(folder, evaluation),
            sweep=sweep_panels(evaluation, evaluation.sweep) if evaluation.sweep and evaluation.sweep.points else [],
            curve=curve_panels(evaluation, evaluation.curve) if evaluation.curve and evaluation.curve.points else [],
            losses=loss_panels(evaluation.losses) if evaluation.losses else [],
        )
    )
    path = folder / file_name(NAME, quick=evaluation.quick)
    write_text(path, text)
    return path


@cache
def _environment() -> Environment:
    environment = page_environment(
        MEASURES=MEASURES,
        SET_TITLES=wording.SET_TITLES,
        SET_MEANINGS=wording.SET_MEANINGS,
        bar=_bar,
        UNADJUSTED=wording.UNADJUSTED,
        findings=findings,
        wording=wording,
    )
    environment.filters.update({"number": wording.number, "percent": wording.percent, "label": wording.label})
    return environment


def _bar(row: Comparison) -> str:
    return interval_bar(row.difference, allowed_loss=row.margin, low_is_better=MEASURES[row.measure].better == "down")


def _by_set(shown: list[Shown]) -> list[tuple[PromptSet, list[Shown], list[Shown]]]:
    """Per prompt set that has pairs: those with videos in the page, and those that are links."""
    groups = []
    sets: tuple[PromptSet, ...] = get_args(PromptSet)
    for name in sets:
        mine = [pair for pair in shown if pair.pair.prompt_set == name]
        if mine:
            groups.append((name, [pair for pair in mine if pair.base.video], [pair for pair in mine if not pair.base.video]))
    return groups


def _others(evaluation: Evaluation) -> list[tuple[PromptSet, list[Comparison]]]:
    """All comparisons, primaries too, by prompt set and in the catalogue's order."""
    order = list(MEASURES)
    ordered = sorted(evaluation.comparisons, key=lambda row: order.index(row.measure))
    sets: tuple[PromptSet, ...] = get_args(PromptSet)
    grouped = [(name, [row for row in ordered if row.prompt_set == name]) for name in sets]
    return [(name, rows) for name, rows in grouped if rows]


def _neighbours(folder: Path, evaluation: Evaluation) -> list[tuple[object, str]]:
    """The nearest generated clips with their pictures as data URIs ("" without one)."""
    found = evaluation.memorisation.nearest[:_NEAREST] if evaluation.memorisation else ()
    return [(row, embed_picture(folder, row.picture) if row.picture else "") for row in found]

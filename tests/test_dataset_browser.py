"""The sheet in a real browser: it fits a phone, asks for nothing, and can be searched and sorted from a file."""

import io
from base64 import b64encode
from pathlib import Path

import pytest
from browser import Page
from PIL import Image
from test_dataset_page import moving, row

from mochi_lora.report.dataset_page import Sheet, write_sheet
from mochi_lora.report.dataset_rows import Counted, LeftOut, Limits, marked

VISIBLE = "[...document.querySelectorAll('.clip')].filter((clip) => !clip.hidden).map((clip) => clip.dataset.order).join('')"
BEYOND = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def picture(width: int, height: int) -> str:
    target = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(target, "PNG")
    return f"data:image/png;base64,{b64encode(target.getvalue()).decode()}"


@pytest.fixture(scope="module")
def sheet(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sheet") / "dataset.html"
    counted = [Counted(tokens, truncated=False, unknown_share=0.0) for tokens in (30, 9, 120)]
    rows = [
        row("a" * 120, note=moving(3.0), counted=counted[0], unused=0.5, strip=picture(2000, 96)),
        row("fox", "a red fox", note=moving(0.1), counted=counted[1]),
        row("owl", "chalk, an owl", counted=counted[2], unused=1.5),
    ]
    write_sheet(path, Sheet("clips", "base", marked(rows, Limits(0.1, 0.1)), [LeftOut("b" * 200, "too short" * 20)], []))
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_without_a_complaint_and_asks_for_nothing(page, sheet, width, dark):
    page.problems.clear()
    page.requests.clear()
    page.open(sheet, width=width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    page.evaluate("document.querySelectorAll('.clip').forEach((clip) => { clip.style.contentVisibility = 'visible'; })")
    assert page.evaluate(BEYOND) == 0
    assert page.problems == []
    assert [address for address in page.requests if not address.startswith("data:")] == [sheet.as_uri()]


def choose(page: Page, field: str, value: str, event: str = "change") -> str:
    page.evaluate(f"(() => {{ const field = document.getElementById('{field}'); field.value = '{value}';"
                  f" field.dispatchEvent(new Event('{event}')); }})()")  # fmt: skip
    return page.evaluate(VISIBLE)


def test_clips_are_searched_and_sorted(page, sheet):
    page.open(sheet)
    assert page.evaluate(VISIBLE) == "123"
    assert choose(page, "sort", "tokens") == "312"
    assert choose(page, "sort", "motion") == "123", "what was not measured stands last"
    assert choose(page, "sort", "unused") == "312"
    assert choose(page, "sort", "order") == "123"
    assert choose(page, "search", "CHALK owl", "input") == "3"
    assert page.evaluate("document.getElementById('count').textContent") == "1 of 3 clips"


def test_a_problem_shows_its_clips_at_a_press(page, sheet):
    page.open(sheet)
    page.evaluate("document.querySelector('.pick[data-mark=\"without the trigger\"]').click()")
    assert page.evaluate(VISIBLE) == "2"
    assert choose(page, "mark", "") == "123"

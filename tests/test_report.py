"""The page, the Markdown and the JSON say what the evaluation says, whatever is missing and whatever prompts hold."""

import base64
import io
import json
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from report_example import NASTY, VARIANTS, comparison, missing_parts, nothing, pairs, quick, worked, write_files

from mochi_lora.errors import UserError
from mochi_lora.evaluation.results import Interval, Missing, Pair, SetDistance, Tally
from mochi_lora.inference.video import write_mp4
from mochi_lora.measures.catalogue import MEASURES
from mochi_lora.report import pictures, plots, wording
from mochi_lora.report.before_after import write_before_after
from mochi_lora.report.markdown import write_markdown
from mochi_lora.report.page import write_page
from mochi_lora.report.results_file import read_results, write_results

ROOT = Path(__file__).parents[1]
VOID = {"meta", "link", "img", "br", "rect", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Elements and text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.words.append(" ")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page_of(folder: Path, evaluation, **bounds) -> Page:
    write_files(folder, evaluation)
    return Page(write_page(folder, evaluation, **bounds).read_text(encoding="utf-8"))


def decoded(uri: str) -> np.ndarray:
    head, content = uri.split(",", 1)
    assert head == "data:video/mp4;base64"
    with av.open(io.BytesIO(base64.b64decode(content))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def soft_clip(frames: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 9 * index)], -1) for index in range(frames)]
    ).astype(np.uint8)


# --- the page -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_whole_page_with_its_verdict_first(variant, tmp_path):
    evaluation = VARIANTS[variant]()
    page = page_of(tmp_path, evaluation)
    headings = [int(tag[1]) for tag, _ in page.found if re.fullmatch(r"h[1-6]", tag)]
    assert headings[:2] == [1, 2]
    assert all(after - before <= 1 for before, after in pairwise(headings)), "a level is skipped"
    assert page.text.index(evaluation.verdict.headline) < page.text.index("Three questions")
    for gap in evaluation.missing:
        assert gap.because in page.text
    assert "nan" not in page.text.lower().split()
    assert all(image["alt"] for image in page.all("img"))
    assert all(plot.get("aria-label") or plot.get("aria-hidden") for plot in page.all("svg"))


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = page_of(tmp_path, worked())
    addresses = [
        value for _, attributes in page.found for name, value in attributes.items() if name in ("src", "href", "poster")
    ]
    assert len(addresses) > 20
    assert [address for address in addresses if not address.startswith("data:")] == []
    assert "http" not in (tmp_path / "report.html").read_text(encoding="utf-8").replace("http-equiv", "")


def test_every_number_of_the_primaries_is_on_the_page_with_its_conclusion(tmp_path):
    evaluation = worked()
    text = page_of(tmp_path, evaluation).text
    for row in (row for row in evaluation.comparisons if row.primary):
        places = wording.decimals(row)
        for value in (row.base, row.adapter, row.difference.value, row.difference.low, row.difference.high):
            assert f"{abs(value):.{places}f}" in text
        assert MEASURES[row.measure].meaning.split(".")[0] in text
    assert "+0.372 (+0.331 to +0.413)" in text


def test_what_people_typed_is_text_and_never_markup(tmp_path):
    plain = worked()
    nasty = replace(
        plain,
        title=NASTY,
        adapter=NASTY,
        base_model=NASTY,
        backbones={NASTY: NASTY},
        settings={NASTY: NASTY, "command": NASTY},
        verdict=replace(plain.verdict, headline=NASTY, reasons=(NASTY,), advice=(NASTY,)),
        missing=(Missing("align.judge", NASTY),),
        pairs=tuple(replace(pair, prompt=NASTY, note=NASTY) for pair in plain.pairs),
        memorisation=replace(
            plain.memorisation,
            calibration=NASTY,
            nearest=tuple(replace(row, prompt=NASTY, training_clip=NASTY) for row in plain.memorisation.nearest),
        ),
        curve=replace(plain.curve, because=NASTY, recommended=NASTY),
        truth={NASTY: (0.0, 1.0)},
    )
    tame, wild = page_of(tmp_path, plain), page_of(tmp_path, nasty)
    assert len(wild.all("script")) == 1
    allowed = {"h1", "script", "tr", "th", "td", "table", "caption", "tbody", "thead", "p", "code", "strong", "h3"}
    assert {tag for tag, _ in wild.found} <= {tag for tag, _ in tame.found} | allowed
    assert "<script>alert" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert wild.text.count(NASTY) >= 15, "the text itself must still be read"
    labels = [video["aria-label"] for video in wild.all("video")]
    assert all(NASTY in label for label in labels)


def test_only_the_pages_own_script_may_run(tmp_path):
    page = page_of(tmp_path, worked())
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    script_policy = policy.split("script-src ")[1]
    assert script_policy.startswith("'sha256-")
    assert "unsafe" not in script_policy


def test_quick_and_built_in_networks_are_said_so(tmp_path):
    text = page_of(tmp_path, quick()).text
    assert "Indicative, nothing was tested" in text
    assert "Not comparable with other people’s numbers" in text
    assert "style score 0.04 0.71 +0.67" in text
    other = page_of(tmp_path, worked()).text
    assert "nothing was tested" not in other
    assert "Not comparable" not in other


def test_only_what_small_networks_measured_is_named_as_not_comparable(tmp_path):
    found = replace(worked(), incomparable=("style.gram", "diversity"))
    page = page_of(tmp_path, found).text
    assert "Not comparable with other people’s numbers: Texture and colour, Diversity." in page
    markdown = write_markdown(tmp_path, found).read_text(encoding="utf-8")
    assert "> Not comparable with other people's numbers: Texture and colour, Diversity." in markdown


@pytest.mark.parametrize(
    ("measure", "tally", "said"),
    [
        ("style.descriptor", Tally(1, 6, 1), "Better on 1, equal on 6, worse on 1 of 8 prompts."),
        ("quality.warp_error", Tally(0, 0, 1), "Better on 0, equal on 0, worse on 1 of 1 prompt."),
        ("diversity", Tally(5, 0, 3), "Larger on 5, equal on 0, smaller on 3 of 8 prompts."),
    ],
)
def test_prompts_that_tie_are_counted_as_ties(measure, tally, said):
    row = comparison(measure, tally=tally, prompts=tally.better + tally.equal + tally.worse)
    assert wording.evidence(row).startswith(said)


def test_gaps_of_one_reason_are_told_together(tmp_path):
    because = "2 of 8 clips have fewer than three frames"
    names = ("quality.warp_error", "quality.motion_smoothness")
    found = replace(worked(), missing=(Missing(names[0], because), Missing("curve", "no"), Missing(names[1], because)))
    assert f"Warp error, Motion smoothness, because {because}. Checkpoints, because no." in page_of(tmp_path, found).text
    markdown = write_markdown(tmp_path, found).read_text(encoding="utf-8")
    assert f"- Warp error, Motion smoothness, because {because}.\n- Checkpoints, because no.\n" in markdown


def test_a_quick_look_tells_no_chance(tmp_path):
    apart = SetDistance("style.distance", 0.3, 0.1, None, None)
    found = replace(quick(), distance=apart)
    for text in (page_of(tmp_path, found).text, write_markdown(tmp_path, found).read_text(encoding="utf-8")):
        assert "nearer than the base’s (distance 0.100 with the adapter, 0.300 without, 0 is none)" in text
        assert not re.search(r"\bP\s*[<=]", text.replace("&lt;", "<"))
        assert "told apart" not in text
        assert "chance alone" not in text
        assert "beyond chance" not in text


def test_a_question_without_its_measure_says_why(tmp_path):
    text = page_of(tmp_path, missing_parts()).text
    assert "Did it learn the style? Not measured: Style similarity, because its network could not be loaded" in text


def test_an_evaluation_of_nothing_has_no_empty_plots(tmp_path):
    page = page_of(tmp_path, nothing())
    assert page.all("svg") == []
    assert page.all("video") == []
    assert page.all("button") == []


def test_every_template_goes_into_the_wheel():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"][
        "mochi_lora"
    ]
    package = ROOT / "mochi_lora"
    packed = {path for pattern in data for path in package.glob(pattern)}
    assert {path.name for path in packed} >= {"page.html", "page.css", "page.js", "verdict.html"}
    assert set((package / "report" / "templates").iterdir()) <= packed


# --- videos -------------------------------------------------------------------------------------------------------------


def test_small_videos_go_in_unchanged_base_left_of_adapter(tmp_path):
    evaluation = worked()
    page = page_of(tmp_path, evaluation)
    videos = [video["src"].split(",", 1)[1] for video in page.all("video")]
    order = sorted(evaluation.pairs, key=lambda pair: ("trigger", "plain", "unrelated").index(pair.prompt_set))
    names = [name for pair in order for name in (pair.base_video, pair.adapter_video)]
    assert videos == [base64.b64encode((tmp_path / name).read_bytes()).decode() for name in names]
    assert all(set(video) >= {"muted", "loop", "playsinline"} for video in page.all("video"))


def test_large_videos_are_made_narrow_with_every_frame_and_their_colours(tmp_path):
    frames = soft_clip(9, 480, 848)
    write_mp4(tmp_path / "large.mp4", frames)
    (shown,) = pictures.embed(tmp_path, [Pair("trigger", "a", 0, "large.mp4", "large.mp4")])
    small = decoded(shown.base.video)
    assert small.shape == (9, 182, 320, 3)
    inner = np.s_[:, 20:160:20, 20:300:20]
    rows, columns = ((np.arange(20, end, 20) + 0.5) * scale for end, scale in ((160, 480 / 182), (300, 848 / 320)))
    wanted = frames[:, rows.astype(int)][:, :, columns.astype(int)]
    assert np.abs(small[inner].astype(int) - wanted.astype(int)).mean() < 4
    assert len(shown.base.video) < (tmp_path / "large.mp4").stat().st_size * 2


def test_a_small_video_that_browsers_do_not_play_is_made_again(tmp_path):
    with av.open(str(tmp_path / "old.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for pixels in soft_clip(6, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    (shown,) = pictures.embed(tmp_path, [Pair("trigger", "a", 0, "old.mp4", "old.mp4")])
    with av.open(io.BytesIO(base64.b64decode(shown.base.video.split(",")[1]))) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].average_rate == 24
        assert len(list(container.decode(video=0))) == 6


def test_beyond_the_bound_pairs_are_links_and_sets_take_turns(tmp_path):
    evaluation = worked()
    page = page_of(tmp_path, evaluation, most_pairs=3)
    assert len(page.all("video")) == 6
    assert "This page carries 3 of 8 pairs" in page.text
    links = [link["href"] for link in page.all("a")]
    assert len(links) == 10
    assert all((tmp_path / link.replace("%20", " ")).is_file() for link in links)
    shown = pictures.embed(tmp_path, evaluation.pairs, most_pairs=3)
    assert sorted(pair.pair.prompt_set for pair in shown if pair.base.video) == ["plain", "trigger", "unrelated"]


def test_the_pages_videos_stay_below_the_bound_of_bytes(tmp_path):
    evaluation = worked()
    write_files(tmp_path, evaluation)
    sizes = [sum((tmp_path / name).stat().st_size for name in (p.base_video, p.adapter_video)) for p in evaluation.pairs]
    bound = sum(sizes) // 2
    shown = pictures.embed(tmp_path, evaluation.pairs, most_bytes=bound)
    inside = [pair for pair in shown if pair.base.video]
    assert 0 < len(inside) < len(shown)
    assert sum(len(side.video) * 3 // 4 for pair in inside for side in (pair.base, pair.adapter)) <= bound + 60 * len(shown)


def test_a_video_that_is_gone_is_named(tmp_path):
    evaluation = worked()
    write_files(tmp_path, evaluation)
    (tmp_path / evaluation.pairs[0].adapter_video).unlink()
    with pytest.raises(UserError, match=re.escape(evaluation.pairs[0].adapter_video)):
        write_page(tmp_path, evaluation)


def test_the_before_after_sheet_shows_base_left_and_adapter_right(tmp_path):
    for name, value in (("base.mp4", 40), ("adapter.mp4", 200)):
        write_mp4(tmp_path / name, np.full((5, 64, 96, 3), value, np.uint8))
    pair = Pair("trigger", "a very long prompt " * 20, 0, "base.mp4", "adapter.mp4")
    path = write_before_after(tmp_path / "sheet.png", tmp_path, [pair] * 3, rows=2)
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)
    grey = np.abs(pixels - 40) < 3
    light = np.abs(pixels - 200) < 3
    assert grey.sum(1).max() > 800
    assert light.sum(1).max() > 800
    assert np.flatnonzero(grey.mean(0) > 0.3).max() < np.flatnonzero(light.mean(0) > 0.3).min()
    bands = np.flatnonzero(np.diff((grey.sum(1) > 800).astype(int)) == 1)
    assert len(bands) == 2, "one band of pictures per row"


# --- plots and words ----------------------------------------------------------------------------------------------------


def bar_places(svg: str) -> dict[str, float]:
    places = {name: float(x) for name, x in re.findall(r'class="(zero|allowed)" (?:x1|x)="([\d.]+)"', svg)}
    return places | {"dot": float(re.search(r'class="dot" cx="([\d.]+)"', svg)[1])}


def test_right_of_zero_is_better_for_every_direction():
    gain = Interval(0.2, 0.1, 0.3)
    up, down = (bar_places(plots.interval_bar(gain, low_is_better=low, allowed_loss=0.05)) for low in (False, True))
    assert up["allowed"] < up["zero"] < up["dot"]
    assert down["dot"] < down["zero"]
    assert down["allowed"] < down["zero"], "the allowed loss is on the worse side"


def test_higher_values_are_higher_in_a_chart_and_what_is_not_a_number_is_left_out():
    line = plots.Line("adapter", ((0.0, 1.0), (1.0, float("nan")), (2.0, 3.0)), hollow=frozenset({2}))
    svg = plots.line_chart("what", [line], plots.Axes("x", "y", marks=((2.0, "keep"),)))
    points = re.findall(r'<circle class="point adapter( hollow)?" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert [ring for ring, _, _ in points] == ["", " hollow"]
    (_, x0, y0), (_, x1, y1) = points
    assert float(x0) < float(x1)
    assert float(y0) > float(y1), "y grows downwards in SVG"
    assert f'class="mark" x1="{x1}"' in svg


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.003, 0.0021), (12, 9000), (0.94, 0.951)])
def test_ticks_are_round_inside_and_a_handful(low, high):
    ticks = plots.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    step = f"{ticks[1] - ticks[0]:.0e}" if len(f"{ticks[1] - ticks[0]:.3g}".strip("0.")) == 1 else "2.5"
    assert step[0] in "125"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3724, "0.372"),
        (0.0123, "0.012"),
        (1.0, "1.00"),
        (163.4, "163"),
        (-0.25, "−0.250"),
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
    ],
)
def test_numbers_read_well(value, text):
    assert wording.number(value) == text


def test_a_rounded_zero_has_no_sign():
    assert wording.number(-0.0001, 2, signed=True) == "0.00"
    assert wording.percent(-0.00001) == "0.0\N{NO-BREAK SPACE}%"


# --- Markdown and JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_markdown_says_the_same_and_its_tables_are_tables(variant, tmp_path):
    evaluation = VARIANTS[variant]()
    text = write_markdown(tmp_path, evaluation).read_text(encoding="utf-8")
    html = MarkdownIt("commonmark").enable("table").render(text)
    page = Page(html)
    assert page.text.index(evaluation.verdict.headline.split(":")[0]) < page.text.index("Three questions")
    assert sum(tag == "table" for tag, _ in page.found) == len(re.findall(r"^\| ---", text, re.MULTILINE))
    for row in evaluation.comparisons:
        assert f"{abs(row.difference.value):.{wording.decimals(row)}f}" in page.text
    assert not re.search(r"\bnan\b", page.text)


def test_prompts_cannot_break_the_markdown(tmp_path):
    evaluation = replace(worked(), pairs=tuple(replace(pair, prompt=f"{NASTY}\n# a\\heading [a](b)") for pair in pairs()))
    text = write_markdown(tmp_path, evaluation).read_text(encoding="utf-8")
    page = Page(MarkdownIt("commonmark").enable("table").render(text))
    assert page.all("script") == []
    assert page.text.count(f"{NASTY} # a\\heading [a](b)") == len(pairs())


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_come_back_exactly(variant, tmp_path):
    evaluation = VARIANTS[variant]()
    path = write_results(tmp_path, evaluation)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    back = read_results(tmp_path, quick=evaluation.quick)
    assert repr(back) == repr(evaluation), "repr, because NaN is not equal to itself"
    assert type(back.pairs) is tuple


def test_results_of_something_else_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"results\.json: no such file"):
        read_results(tmp_path)
    path = write_results(tmp_path, worked())
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"format": "mochi-lora evaluation 1"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluation 1.*expected.*evaluation 2.*again"):
        read_results(tmp_path)
    del content["comparisons"][0]["margin"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"comparisons\.0\.margin"):
        read_results(tmp_path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON"):
        read_results(tmp_path)


def test_set_distance_strength_zero_grids_and_bare_p_values_are_told_on_page_and_in_markdown(tmp_path):
    apart = SetDistance("style.distance", 0.3, 0.01, 0.001, 0.4)
    found = replace(worked(), distance=apart, strength_zero_is_base=True, grids=("grid.mp4",))
    page = page_of(tmp_path, found).text
    markdown = write_markdown(tmp_path, found).read_text(encoding="utf-8")
    for text in (page, re.sub(r"\s+", " ", markdown)):
        assert "nearer than the base’s and not told apart from them" in text
        assert "bit for bit" in text
        assert "grid.mp4" in text
        assert "Every other P stands for itself" in text
    broken = replace(found, strength_zero_is_base=False)
    assert "trust nothing here" in page_of(tmp_path, broken).text

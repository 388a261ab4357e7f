"""The page in a real browser: nothing is asked of the network, videos play, and it fits a phone."""

from pathlib import Path

import pytest
from report_example import VARIANTS, write_files

from mochi_lora.report.page import write_page

VISIBLE_WIDTH = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
READY = "[...document.querySelectorAll('video')].every((video) => video.readyState >= 1)"


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, variant in VARIANTS.items():
        folder, evaluation = tmp_path_factory.mktemp(name), variant()
        write_files(folder, evaluation)
        made[name] = write_page(folder, evaluation)
    return made


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_fits_without_a_complaint_and_asks_for_nothing(page, reports, variant, width):
    page.problems.clear()
    page.requests.clear()
    page.open(reports[variant], width=width)
    page.wait_for(READY)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate(VISIBLE_WIDTH) == 0
    assert page.problems == []
    assert {address.split(":")[0] for address in page.requests} <= {"file", "data"}
    assert [address for address in page.requests if address.startswith("file:")] == [reports[variant].as_uri()]


def test_every_video_has_a_picture_and_plays_at_the_buttons_press(page, reports):
    page.open(reports["worked"])
    page.wait_for(READY)
    sizes = page.evaluate("[...document.querySelectorAll('video')].map((video) => video.videoWidth)")
    assert sizes == [96] * 16
    assert page.evaluate("[...document.querySelectorAll('video')].every((video) => video.paused)")
    page.evaluate("document.getElementById('play-all').click()")
    page.wait_for("[...document.querySelectorAll('video')].every((video) => !video.paused && video.currentTime > 0)")
    page.wait_for("document.getElementById('play-all').textContent === 'Pause all'")
    page.evaluate("document.getElementById('play-all').click()")
    page.wait_for("[...document.querySelectorAll('video')].every((video) => video.paused)")


def test_a_video_plays_with_its_partner_from_mouse_and_keyboard(page, reports):
    page.open(reports["worked"])
    page.wait_for(READY)
    playing = "[...document.querySelectorAll('video')].map((video) => Number(!video.paused)).join('')"
    page.evaluate("document.querySelectorAll('video')[3].click()")
    page.wait_for(f"{playing} === '0011' + '0'.repeat(12)")
    page.evaluate("document.querySelectorAll('video')[2].dispatchEvent(new KeyboardEvent('keydown', { key: ' ' }))")
    page.wait_for(f"{playing} === '0'.repeat(16)")


def test_a_script_that_is_not_the_pages_own_does_not_run(page, tmp_path):
    path = write_page(tmp_path, VARIANTS["nothing"]())
    safe = path.read_text(encoding="utf-8")
    path.write_text(safe.replace("</main>", "<script>document.title = 'broken'</script></main>"), encoding="utf-8")
    page.open(path)
    assert page.evaluate("document.title") != "broken", "the policy must stop what escaping let through"
    assert any("Content Security Policy" in problem for problem in page.problems)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(page, reports, dark):
    """WCAG 2.1, 1.4.3: 4.5 to 1 for text of this size, in both colour schemes."""
    page.open(reports["memorises"], dark=dark)
    luminance = """(colour) => {
      const parts = colour.match(/[\\d.]+/g).slice(0, 3)
        .map((part) => part / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
      return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    }"""
    ratios = page.evaluate(f"""(() => {{
      const luminance = {luminance};
      const ground = (node) => {{
        for (; node; node = node.parentElement) {{
          const colour = getComputedStyle(node).backgroundColor;
          if (!colour.startsWith('rgba(0, 0, 0, 0')) return colour;
        }}
        return 'rgb(255, 255, 255)';
      }};
      return [...document.querySelectorAll('p, li, th, td, strong, .dim, h1, h2, button, summary')].map((node) => {{
        const [a, b] = [luminance(getComputedStyle(node).color), luminance(ground(node))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
      }});
    }})()""")
    assert len(ratios) > 50
    assert min(ratios) >= 4.5

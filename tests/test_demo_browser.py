"""The demo in a real browser: type, generate, see two videos, cancel, and be impatient."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from adapter_files import write_adapter
from browser import Page
from served_demo import Gate, configuration, open_session, served

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.demo.access import USER
from mochi_lora.demo.page import Offer, Offered
from mochi_lora.tiny.pretrained import WEIGHTS

PASSWORD = "søster"  # noqa: S105
THERE = "!!(document.querySelector('#generate') && document.querySelector('#status'))"
BEYOND = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
STATUS = "document.querySelector('#status').innerText"
ENABLED = "!document.querySelector('#generate').disabled"
SHOWN = "[...document.querySelectorAll('video')].filter((video) => video.readyState >= 1).length"

pytestmark = pytest.mark.slow  # Gradio alone takes seconds to import


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def offer(tiny, folder):
    words, config = configuration(tiny, folder)
    files = [write_adapter(folder / f"{name}.safetensors", tiny, seed) for seed, name in ((1, "style"), (2, "motion"))]
    offered = tuple(Offered(path.stem, AdapterChoice(path, 0.8), chosen=path is files[0]) for path in files)
    return Offer("tiny on the CPU", "a fox", config.sample, offered, tuple(words), folder / "videos")


@pytest.fixture(scope="module")
def gate(tiny, folder, offer):
    return Gate(open_session(configuration(tiny, folder)[1], offer.folder))


@pytest.fixture(scope="module")
def address(gate, offer, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "served"))
        with served(offer, gate) as url:
            yield url


@pytest.fixture
def demo(page, address, gate):
    """The page just opened, nothing begun."""
    gate.shut = False
    gate.begun = gate.most = gate.asked = 0
    page.problems.clear()
    page.requests.clear()
    page.open(address)
    page.wait_for(THERE)
    page.wait_for(f"{STATUS} === 'Ready.'")
    yield page
    gate.shut = False


def type_into(page: Page, field: str, text: str) -> None:
    """As a person does: click there, mark all, type."""
    page.evaluate(f"(() => {{ const it = document.querySelector({field!r}); it.focus(); it.select(); }})()")
    if text:
        page.command("Input.insertText", text=text)
    else:
        for kind in ("keyDown", "keyUp"):
            page.command("Input.dispatchKeyEvent", type=kind, key="Backspace", code="Backspace", windowsVirtualKeyCode=8)


def click(page: Page, button: str) -> None:
    page.evaluate(f"document.querySelector('#{button}').click()")


def new_seed(page: Page, seed: int) -> None:
    type_into(page, "#seed input, #seed textarea", str(seed))


def until_all_are_answered(page: Page, gate: Gate) -> None:
    """However many of the clicks the browser sent: each has asked for a place in the line."""
    calm = 0
    while calm < 20:
        page.evaluate("new Promise((go) => setTimeout(go, 50))")
        calm = calm + 1 if gate.asked == sum("queue/join" in request for request in page.requests) else 0


def test_what_is_typed_becomes_two_videos_and_a_command(demo, gate, offer):
    type_into(demo, "#prompt textarea", "a red ball & <b>snow</b>")
    new_seed(demo, 1)
    click(demo, "generate")
    demo.wait_for(f"{STATUS}.startsWith('Done in')")
    demo.wait_for(f"{SHOWN} === 2")
    assert demo.evaluate("[...document.querySelectorAll('video')].map((video) => video.videoWidth)") == [48, 48]
    demo.wait_for("[...document.querySelectorAll('video')].every((video) => video.currentTime > 0)")
    assert demo.evaluate("document.querySelector('#adapter-film').innerText").startswith("With style 0.8")
    command = demo.evaluate("document.querySelector('#command textarea').value")
    assert "'--prompt=a red ball & <b>snow</b>' --seed=1" in command
    assert len(command.splitlines()) == 2
    abouts = [json.loads(path.read_text()) for path in offer.folder.glob("a-red-ball*.json")]
    assert {about["prompt"] for about in abouts} == {"a red ball & <b>snow</b>"}
    assert sorted(len(about["adapters"]) for about in abouts) == [0, 1]
    assert demo.evaluate(ENABLED)
    assert demo.problems == []
    assert {request.partition(":")[0] for request in demo.requests} <= {"http", "data", "blob"}
    assert {request.split("/")[2] for request in demo.requests if request.startswith("http:")} == {
        demo.evaluate("location.host")
    }


def test_cancel_ends_the_job_between_two_steps(demo, gate, offer):
    before = set(offer.folder.iterdir())
    gate.shut = True
    new_seed(demo, 2)
    click(demo, "generate")
    demo.wait_for(f"{STATUS}.startsWith('Base video: step 1 of 2, about')")
    assert not demo.evaluate(ENABLED)
    demo.wait_for("!document.querySelector('#cancel').disabled")
    click(demo, "cancel")
    demo.wait_for(f"{STATUS} === 'Cancelled.'")
    demo.wait_for(ENABLED)
    assert demo.evaluate("document.querySelector('#cancel').disabled")
    assert (gate.running, set(offer.folder.iterdir())) == (0, before)
    gate.shut = False
    click(demo, "generate")
    demo.wait_for(f"{SHOWN} === 2")


def test_fifty_quick_clicks_begin_one_job_and_leave_the_page_usable(demo, gate):
    gate.shut = True
    new_seed(demo, 3)
    demo.evaluate("for (let i = 0; i < 50; i++) document.querySelector('#generate').click()")
    demo.wait_for(f"{STATUS}.includes('step 1 of 2')")
    until_all_are_answered(demo, gate)
    assert (gate.begun, gate.running) == (1, 1)
    assert not demo.evaluate(ENABLED)
    assert demo.evaluate(STATUS).startswith("Base video: step 1 of 2")
    gate.shut = False
    demo.wait_for(f"{STATUS}.startsWith('Done in')")
    demo.wait_for(f"{SHOWN} === 2")
    new_seed(demo, 4)
    click(demo, "generate")
    demo.wait_for("document.querySelector('#command textarea').value.includes('--seed=4')")
    demo.wait_for(f"{STATUS}.startsWith('Done in')")
    assert (gate.begun, gate.running, gate.most) == (2, 0, 1), "the other 49 clicks must not come later"
    assert demo.problems == []


def test_a_second_tab_waits_for_its_turn_and_may_cancel_meanwhile(demo, gate, address, tmp_path_factory):
    from browser import open_browser

    gate.shut = True
    new_seed(demo, 5)
    click(demo, "generate")
    demo.wait_for(f"{STATUS}.includes('step 1 of 2')")
    with open_browser(tmp_path_factory.mktemp("second")) as second:
        second.open(address)
        second.wait_for(THERE)
        click(second, "generate")
        second.wait_for(f"{STATUS} === 'Waiting: 1 video of others before yours'")
        click(second, "cancel")
        second.wait_for(f"{STATUS} === 'Cancelled.'")
    assert (gate.begun, gate.running) == (1, 1)
    gate.shut = False
    demo.wait_for(f"{STATUS}.startsWith('Done in')")


def test_a_page_that_is_closed_gives_up_its_job(demo, gate, page):
    gate.shut = True
    new_seed(demo, 6)
    click(demo, "generate")
    demo.wait_for(f"{STATUS}.includes('step 1 of 2')")
    page.open("data:text/html,gone")
    for _ in range(600):
        if not gate.running:
            break
        page.evaluate("new Promise((go) => setTimeout(go, 50))")
    assert gate.running == 0


def test_what_cannot_be_used_is_told_below_its_field(demo, gate):
    type_into(demo, "#prompt textarea", "")
    type_into(demo, "#width input", "100")
    type_into(demo, "#guidance input, #guidance textarea", "much")
    click(demo, "generate")
    demo.wait_for(f"{STATUS}.startsWith('Nothing was made')")
    for field, block, text in (
        ("prompt", "prompt", "Prompt: write what the video should show"),
        ("size", "width", "Size 100: Mochi takes multiples of 16, use 96 or 112"),
        ("guidance", "guidance", "Guidance: got much, expected a number"),
    ):
        assert demo.evaluate(f"document.querySelector('#problem-{field}').innerText").startswith(text)
        below = f"document.querySelector('#problem-{field}').getBoundingClientRect().top"
        gap = demo.evaluate(f"{below} - document.querySelector('#{block}').getBoundingClientRect().bottom")
        assert -2 <= gap <= 60, (field, gap)
    assert (gate.begun, demo.evaluate(SHOWN)) == (0, 0)
    type_into(demo, "#prompt textarea", "a fox")
    type_into(demo, "#width input", "48")
    type_into(demo, "#guidance input, #guidance textarea", "6")
    click(demo, "generate")
    demo.wait_for(f"{SHOWN} === 2")
    assert demo.evaluate("document.querySelectorAll('.problem').length") == 0


def test_an_error_of_the_program_leaves_the_page_usable(demo, gate, monkeypatch):
    monkeypatch.setattr(gate, "_session", None)
    click(demo, "generate")
    demo.wait_for(f"{STATUS}.includes('an error of the program')")
    demo.wait_for(ENABLED)
    monkeypatch.undo()
    click(demo, "generate")
    demo.wait_for(f"{STATUS}.startsWith('Done in')")


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen(demo, address, width):
    demo.open(address, width=width)
    demo.wait_for(THERE)
    click(demo, "generate")
    demo.wait_for(f"{SHOWN} === 2")
    assert demo.evaluate(BEYOND) == 0
    assert demo.evaluate("document.querySelector('#generate').getBoundingClientRect().width") > width / 4
    assert demo.problems == []


def test_a_strength_is_offered_for_each_adapter_that_is_on(demo):
    visible = "[0, 1].map((number) => document.querySelector(`#strength-${number}`)?.offsetParent != null)"
    assert demo.evaluate(visible) == [True, False]
    demo.evaluate("document.querySelector('#adapters .token-remove').click()")
    demo.wait_for(f"JSON.stringify({visible}) === '[false,false]'")


# --- without a browser --------------------------------------------------------------------------------------------------


def test_a_password_guards_everything_and_nothing_can_be_uploaded(offer, gate, address):
    with served(offer, gate, password=PASSWORD) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("config").status_code == 401
        assert client.post("login", data={"username": USER, "password": "wrong"}).status_code == 400
        assert client.get("config").status_code == 401
        assert client.post("login", data={"username": USER, "password": PASSWORD}).status_code == 200
        assert client.get("config").status_code == 200
        uploaded = client.post("gradio_api/upload", files={"files": ("x.txt", b"too much")})
        assert uploaded.status_code == 413
    with httpx.Client(base_url=address, trust_env=False) as client:
        assert "connect-src 'self'" in client.get("").headers["content-security-policy"]
        assert client.get(f"gradio_api/file={Path(__file__).resolve()}").status_code == 403


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    words = ["--config", "quickstart.yaml", f"--model.base={WEIGHTS}", f"--run.folder={tmp_path}"]
    call = [sys.executable, "-m", "mochi_lora", "demo", *words, "--port", "0"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("page "):
                break
        url = said[-1].split()[-1]
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            assert "mochi-lora demo" in client.get("").text
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, [*said, rest]
    assert "Traceback" not in rest

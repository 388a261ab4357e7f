"""A headless Chromium spoken to in its own protocol (CDP): pages opened, errors and requests collected, pictures taken."""

import json
import os
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 30.0
# A browser under test must not look for updates; --no-sandbox because containers run tests as root.
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
)  # fmt: skip


def browser() -> str | None:
    """Path of an installed Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One open tab. `problems` are console errors and exceptions, `requests` every address that was asked for."""

    socket: ClientConnection
    session: str = ""
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: bool = False
    _count: int = 0

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; whatever happens meanwhile is noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv(timeout=_SECONDS))
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.problems.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(parameters["entry"]["text"])

    def open(self, place: Path | str, *, width: int = 1280, dark: bool = False) -> None:
        """Load a file or an address and wait for its load event."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.loaded = False
        url = place if isinstance(place, str) else place.resolve().as_uri()
        answer = self.command("Page.navigate", url=url)
        assert "errorText" not in answer, f"{place}: {answer['errorText']}"
        deadline = time.monotonic() + _SECONDS
        while not self.loaded:
            assert time.monotonic() < deadline, f"{place} did not load"
            self._note(json.loads(self.socket.recv(timeout=_SECONDS)))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        # A user's gesture is pretended: without one a browser may refuse to play.
        result = self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + _SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        taken = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(b64decode(taken["data"]))


@contextmanager
def open_browser(folder: Path) -> Iterator[Page]:
    """A fresh browser with its profile in `folder`, closed at the end."""
    program = browser()
    assert program
    port_file = folder / "DevToolsActivePort"
    environment = {**os.environ, "HOME": str(folder)}
    log = folder / "browser.log"
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={folder}"], stdout=stream, stderr=stream, env=environment
        ) as process,
    ):
        try:
            deadline = time.monotonic() + _SECONDS
            while not (port_file.exists() and port_file.read_text().count("\n")):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            port, address = port_file.read_text().split()
            with connect(f"ws://127.0.0.1:{port}{address}", max_size=None, proxy=None) as socket:
                page = Page(socket)
                target = page.command("Target.createTarget", url="about:blank")["targetId"]
                page.session = page.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
                for domain in ("Page", "Runtime", "Network", "Log"):
                    page.command(f"{domain}.enable")
                yield page
        finally:
            process.terminate()

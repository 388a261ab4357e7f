"""A small model hub on loopback: what huggingface_hub and `mochi-lora download` ask of the real one, and its accidents."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "14be5fcea23095ed330cb214647916a451e38b6e"
LARGE = 10_000  # bytes from which a file is in LFS and comes by a redirect, as from the real hub's content network


@dataclass
class Hub:
    """Serves `root` as one repository. Tests read `asked` and set the accidents."""

    root: Path
    base: str = "genmo/mochi-1-preview"
    commit: str = COMMIT
    tags: tuple[str, ...] = ("main",)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    breaks_after: dict[str, int] = field(default_factory=dict)  # path -> bytes of each answer, then the line goes dead
    wrong: dict[str, bytes] = field(default_factory=dict)  # path -> other content of the same size
    knows_ranges: bool = True
    endpoint: str = ""

    def paths(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def ranges_of(self, path: str) -> list[str]:
        """The Range of each request for the content of `path`, "" for none."""
        return [asked for method, what, asked in self.asked if method == "GET" and what == f"/content/{path}"]

    def fetched(self) -> set[str]:
        """Paths whose whole content was asked for, or the rest of it."""
        whole = {what for method, what, asked in self.asked if method == "GET" and re.fullmatch(r"(bytes=\d+-)?", asked)}
        return {path for path in self.paths() if {f"/content/{path}", self._resolved(path)} & whole}

    def _resolved(self, path: str) -> str:
        return f"/{self.base}/resolve/{self.commit}/{path}"

    def listing(self) -> dict:
        siblings = []
        for path in self.paths():
            content = (self.root / path).read_bytes()
            item = {"rfilename": path, "size": len(content)}
            item["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
            if len(content) >= LARGE:
                item["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            siblings.append(item)
        return {"id": self.base, "sha": self.commit, "siblings": siblings, "tags": [], "private": False}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if match := re.fullmatch(rf"/api/models/{hub.base}/revision/(.+)", path):
            if match[1] in (*hub.tags, hub.commit):
                return self._answer(200, json.dumps(hub.listing()).encode())
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith(f"/{hub.base}/resolve/{hub.commit}/"):
            name = path.removeprefix(f"/{hub.base}/resolve/{hub.commit}/")
            if name in hub.paths():
                if (hub.root / name).stat().st_size >= LARGE:
                    return self._answer(302, b"", {"Location": f"/content/{name}"})
                return self._give(name)
        if path.startswith("/content/") and path.removeprefix("/content/") in hub.paths():
            return self._give(path.removeprefix("/content/"))
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _give(self, name: str) -> None:
        content = self.hub.wrong.get(name, (self.hub.root / name).read_bytes())
        size, asked = len(content), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers, status = {"ETag": '"etag"', "X-Repo-Commit": self.hub.commit}, 200
        if asked and self.hub.knows_ranges:
            start, end = int(asked[1]), int(asked[2] or size - 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{size}"
            content = content[start : end + 1]
        self._answer(status, content, headers, self.hub.breaks_after.get(name))

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None, limit: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:limit])
        if limit is not None and limit < len(content):
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port of loopback, its address in `hub.endpoint`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

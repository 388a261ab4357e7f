"""A hub on loopback that takes uploads: repositories made, files checked in, each piece as huggingface_hub sends it.

Answers what `create_repo`, `model_info`, `whoami` and `upload_folder` ask for over Git LFS; Xet, which the real hub prefers,
is a protocol of its own and has to be off (HF_HUB_DISABLE_XET).
"""

import hashlib
import json
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_writes"  # noqa: S105 - opens nothing but this
READ_ONLY = "hf_reads"


@dataclass
class Repository:
    """One that was made; `files` are what the last commit of each path left."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What lies there, and every request as `METHOD path`."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def open_hub() -> Iterator[Hub]:
    """The hub, closed at the end."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_told: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._begin()
        if not self._token():
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/whoami-v2":
            return self._answer(200, {"name": "me", "type": "user", "auth": {}})
        name = self.path.removeprefix("/api/models/").split("?")[0]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._answer(404, {"error": "Repository not found"})
        return self._answer(200, {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        content = self._begin()
        oid = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(content).hexdigest() == oid, "what arrived is not what was announced"
        self.hub.blobs[oid] = content
        return self._answer(200, {})

    def do_POST(self) -> None:
        content = self._begin()
        if self._token() != TOKEN:
            return self._answer(403, {"error": "You don't have the rights"})
        if self.path == "/api/repos/create":
            return self._create(json.loads(content))
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            wanted = json.loads(content)["files"]
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "regular" if item["path"].endswith(".md") else "lfs",
                    "shouldIgnore": False,
                }
                for item in wanted
            ]
            return self._answer(200, {"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            actions = [{**item, "actions": {"upload": {"href": f"{self.hub.address}/blob/{item['oid']}"}}} for item in objects]
            return self._answer(200, {"transfer": "basic", "objects": actions})
        return self._commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), content)

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        address = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **address})
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._answer(200, address)

    def _commit(self, name: str, content: bytes) -> None:
        repository = self.hub.repositories[name]
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.commits.append(value["summary"])
                case "file":
                    repository.files[value["path"]] = b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.hub.blobs[value["oid"]]
        return self._answer(200, {"commitOid": "c" * 40, "commitUrl": f"{self.hub.address}/{name}/commit/{'c' * 40}"})

    def _begin(self) -> bytes:
        self.hub.requests.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _token(self) -> str | None:
        told = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return told if told in (TOKEN, READ_ONLY) else None

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

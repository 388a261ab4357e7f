"""The page behind a socket: one server, no outside help. Whatever the page says, the browser asks nobody else."""

import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from mochi_lora.demo.access import USER, login
from mochi_lora.demo.page import theme
from mochi_lora.errors import UserError

# Gradio builds its page with inline scripts and `eval`ed templates; only where things come from can be kept in.
_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; object-src 'none'; "
    "frame-ancestors 'self'; form-action 'self'"
)
_LEAVE_SECONDS = 2  # open pages keep a connection for ever

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"--host {host} --port {port}: cannot be listened on ({reason})"
        raise UserError(f"{message}; is another demo running? Give another --port") from error


def server_of(blocks: gr.Blocks, folder: Path, password: str | None) -> uvicorn.Server:
    """A server of the page; `run(sockets=[...])` it. Only videos in `folder` are shown, nothing can be uploaded."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth=login(password) if password is not None else None,
        auth_message=f"The user name is {USER}.",
        allowed_paths=[str(folder.absolute())],
        max_file_size=1,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css_paths=Path(__file__).with_name("page.css"),
    )
    guarded = _own_sources_only(app)
    return uvicorn.Server(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=_LEAVE_SECONDS))


def _own_sources_only(app: FastAPI) -> Callable[[_Message, _Receive, _Send], Awaitable[None]]:
    """`app`, with the policy in the head of every answer."""

    async def guarded(scope: _Message, receive: _Receive, send: _Send) -> None:
        async def with_policy(message: _Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"same-origin")]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await app(scope, receive, with_policy)

    return guarded

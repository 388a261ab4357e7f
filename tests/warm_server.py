"""The server that processes of tests are forked from: a worker of pytest pays for the imports once, for all its files."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path

# Of all who use it, whoever comes first: a server that runs loads nothing more, and then every process would for itself.
_ROOMS = ["gang", "warm_processes"]


@contextmanager
def warm_server() -> Iterator[BaseContext]:
    """What makes processes; they are to be started inside the `with`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_ROOMS)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # for the server's preload
    try:
        yield context
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.__setitem__("PYTHONPATH", path)

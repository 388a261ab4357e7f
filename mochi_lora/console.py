"""What people see: one console, a progress bar with ETA, tables. Only the main process talks."""

import logging
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_is_main = int(os.environ.get("RANK", "0")) == 0
# Logs (a pipe, CI) get wide lines: rich's guess of 80 columns would break paths and tables.
_LOG_WIDTH = 160
_LOG_SECONDS = 30.0
_WIDTH = None if sys.stdout.isatty() else _LOG_WIDTH
# No emoji: `a:-1:` in a path would be a thumb that points down.
console = Console(quiet=not _is_main, soft_wrap=True, highlight=False, emoji=False, width=_WIDTH)
errors = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def hush_libraries() -> None:
    """Silence what bitsandbytes logs on every import beside a CPU torch: an optional kernel it can do without."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _Lines(Progress):
    """Progress for a pipe or a log file, where rich shows nothing before the end: a line now and then."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        super().__init__(*columns, console=console)
        self._printed = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:  # noqa: ANN401 - rich's signature
        """As rich's, and a line if the last one is old."""
        super().update(task_id, **changes)
        if time.monotonic() - self._printed >= _LOG_SECONDS:
            self._printed = time.monotonic()
            self.console.print(self.make_tasks_table(self.tasks))


def progress_bar(*extra: TextColumn) -> Progress:
    """A bar with count, elapsed time and time left; `extra` columns (cut first on a narrow screen) read fields of `update`."""
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *extra,
    )
    return (
        Progress(*columns, console=console, refresh_per_second=2) if console.is_terminal else _Lines(*columns, console=console)
    )


def print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A plain table; cells are shown with `str`, brackets in them are not markup."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    console.print(table)

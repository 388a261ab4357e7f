"""What people see: one console, a progress bar with ETA, tables. Only the main process talks."""

import os
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_is_main = int(os.environ.get("RANK", "0")) == 0
# Logs (a pipe, CI) get wide lines: rich's guess of 80 columns would break paths in two.
console = Console(quiet=not _is_main, soft_wrap=not sys.stdout.isatty(), highlight=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False)


def progress_bar(*extra: TextColumn) -> Progress:
    """A bar with count, elapsed time and ETA; `extra` columns read fields given to `update`."""
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *extra,
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=False, refresh_per_second=2)


def print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A plain table; cells are shown with `str`, brackets in them are not markup."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    console.print(table)

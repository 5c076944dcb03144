"""A progress bar for work that may be over before anybody would have looked at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with what is done and what there is, in bytes or tokens."""

PATIENCE_SECONDS = 2.0


@contextmanager
def progress_bar(title: str, patience: float = PATIENCE_SECONDS, unit: str = "bytes") -> Iterator[Progress]:
    """A `Progress` that draws a bar on standard error, once `patience` seconds have passed and where that is a terminal.

    Numbers are bytes, shown as sizes and a speed, or are followed by `unit`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    if unit == "bytes":
        amount = (DownloadColumn(), TransferSpeedColumn())
    else:
        amount = (TextColumn(f"{{task.completed:,}} of {{task.total:,}} {unit}"),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)
    begun = time.monotonic()

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if not bar.live.is_started and done < total and time.monotonic() - begun > patience and bar.console.is_terminal:
            bar.start()

    try:
        yield update
    finally:
        if bar.live.is_started:  # a bar that never was would end with an empty line
            bar.stop()

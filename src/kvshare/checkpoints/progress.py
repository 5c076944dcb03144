"""A progress bar for work that may be over before anybody would have looked at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are."""

PATIENCE_SECONDS = 2.0


@contextmanager
def progress_bar(title: str, patience: float = PATIENCE_SECONDS) -> Iterator[Progress]:
    """A `Progress` that draws a bar on standard error, once `patience` seconds have passed and where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
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
        bar.stop()

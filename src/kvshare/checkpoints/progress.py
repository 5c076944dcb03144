"""Telling people who wait what is being done: a line, and a bar for work that may be over before anybody would have looked at it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with what is done and what there is, in bytes or tokens."""

Notice = Callable[[str], None]
"""Called with a line for people who wait."""

PATIENCE_SECONDS = 2.0
LINE_SECONDS = 30.0  # between two lines where there is no terminal


def say(line: str) -> None:
    """A `Notice` that writes to standard error."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(line, style="dim", markup=False, soft_wrap=True)


def ignore(line: str) -> None:
    """A `Notice` for nobody."""


@contextmanager
def progress_bar(title: str, patience: float = PATIENCE_SECONDS, unit: str = "bytes") -> Iterator[Progress]:
    """A `Progress` that shows on standard error once `patience` seconds have passed: a bar on a terminal, elsewhere a line now and then.

    Numbers are bytes, shown as sizes and a speed, or are followed by `unit`.
    """
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    if unit == "bytes":
        amount = (DownloadColumn(), TransferSpeedColumn())
    else:
        amount = (TextColumn(f"{{task.completed:,}} of {{task.total:,}} {unit}"),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)
    begun, shown = time.monotonic(), -math.inf

    def amount_of(number: int) -> str:
        return decimal(number) if unit == "bytes" else f"{number:,} {unit}"

    def update(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        bar.update(task, completed=done, total=total)
        if done >= total or now - begun <= patience or now - shown < (math.inf if bar.console.is_terminal else LINE_SECONDS):
            return
        first, shown = shown < 0, now
        if bar.console.is_terminal:
            bar.start()
        elif first:
            bar.console.print(f"{title}: {amount_of(total)}", highlight=False)
        else:
            left = (now - begun) * (total - done) / done if done else math.inf
            bar.console.print(f"{title}: {done / total:.0%} of {amount_of(total)}, about {left / 60:.0f} min left", highlight=False)

    try:
        yield update
    finally:
        if bar.live.is_started:  # a bar that never was would end with an empty line
            bar.stop()

"""How long the native kernels take, by kind of work: two looks at the clock around each call, and nothing while no stopwatch runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from kvshare.kernels.native import available, module


class Lap(NamedTuple):
    seconds: float = 0.0
    calls: int = 0


class Laps(NamedTuple):
    products: Lap = Lap()  # weights times activations
    attention: Lap = Lap()
    small: Lap = Lap()  # norms, rotations, activations, appends: everything else


class Stopwatch:
    """Times the kernels that one thread calls, replayed ones too."""

    def __init__(self) -> None:
        self._native = module().Stopwatch() if available() else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds to `laps` until it is left. Raises `RuntimeError` where this thread has one that runs."""
        if self._native is None:
            yield
            return
        self._native.start()
        try:
            yield
        finally:
            self._native.stop()

    @property
    def laps(self) -> Laps:
        """What was timed so far; nothing without kernels."""
        return Laps() if self._native is None else Laps(*(Lap(*lap) for lap in self._native.laps))

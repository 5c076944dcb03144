"""The bandwidth for engines that ask: those that come later in a round are kept waiting until it is what the first one met."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvshare.benchmark.summary import in_one_regime

Point = tuple[int, int]
"""Context and batch."""

PAUSE_SECONDS = 2.0  # between two looks at a machine that reads at another speed


class Bandwidth:
    """Answers engines with 10^9 bytes a second. `probe` measures; `patience`: the seconds that an engine may be kept waiting at a point."""

    def __init__(self, probe: Callable[[], float], patience: float, sleep: Callable[[float], object] = time.sleep) -> None:
        self._probe, self._patience, self._sleep = probe, patience, sleep
        self._met: dict[Point, Sequence[float]] = {}

    def begin_round(self) -> None:
        """Whoever comes first sets again what the others should meet."""
        self._met.clear()

    def met(self, point: Point, around: Sequence[float]) -> None:
        """What was measured around an engine's decode steps at `point`: the round's first one counts."""
        if around:
            self._met.setdefault(point, around)

    def before(self, point: Point) -> float:
        """Where an engine is about to time its steps for the first time at `point`: waits as long as it would meet another machine."""
        speed, waited = self._probe(), 0.0
        while not in_one_regime([speed, *self._met.get(point, ())]) and waited < self._patience:
            self._sleep(PAUSE_SECONDS)
            speed, waited = self._probe(), waited + PAUSE_SECONDS
        return speed

    def now(self) -> float:
        return self._probe()

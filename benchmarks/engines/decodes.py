"""Decode steps beside the bandwidth right before and after them, and again where it moved meanwhile. Imports nothing of kvshare."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

ATTEMPTS = 3
STEADY = 1.15  # the higher of the bandwidths before and after over the lower one: beyond it the steps are timed again

Attempt = dict[str, Any]
"""`decode_s`, seconds of one step; `before_gb_s` and `after_gb_s`, None where nobody measured."""


def ask_bandwidth() -> float | None:
    """10^9 bytes a second that can be read right now, as the process that started this one measures them; None where none answers."""
    print(json.dumps({"ask": "bandwidth"}), flush=True)
    answer = sys.stdin.readline()
    return json.loads(answer) if answer.strip() else None


def decodes(run: Callable[[], float], attempts: int = ATTEMPTS, ask: Callable[[], float | None] = ask_bandwidth) -> dict[str, Any]:
    """Time decode steps (`run` returns seconds a step) up to `attempts` times, until the bandwidth is the same before and after.

    A measurement's part: `decode_s` and `around_gb_s` of the steadiest attempt, and all of them as `decodes`.
    """
    found: list[Attempt] = []
    before = ask()
    while len(found) < attempts and not (found and moved(found[-1]) <= STEADY):
        seconds = run()
        found.append({"decode_s": seconds, "before_gb_s": before, "after_gb_s": (before := ask())})
    return chosen(found)


def chosen(found: list[Attempt]) -> dict[str, Any]:
    """The part of a measurement that `decodes` returns."""
    best = min(found, key=moved)
    around = [best[name] for name in ("before_gb_s", "after_gb_s") if best[name] is not None]
    return {"decode_s": best["decode_s"], "around_gb_s": around, "decodes": found}


def moved(attempt: Attempt) -> float:
    """The higher bandwidth over the lower one; 1 where one of them is not known."""
    before, after = attempt["before_gb_s"], attempt["after_gb_s"]
    return max(before, after) / min(before, after) if before and after else 1.0

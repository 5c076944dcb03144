"""Decode steps beside the bandwidth right before and after them: several times, more often where it moved. Imports nothing of kvshare."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

STEADY = 1.15  # the higher of the bandwidths before and after over the lower one: beyond it an attempt does not count
ENOUGH = 3  # attempts that count: a neighbour who takes the processor for a moment spoils one
ATTEMPTS = 5

Attempt = dict[str, Any]
"""`decode_s`, seconds of one step; `before_gb_s` and `after_gb_s`, None where nobody measured."""


def ask_bandwidth() -> float | None:
    """10^9 bytes a second that can be read right now, as the process that started this one measures them; None where none answers."""
    print(json.dumps({"ask": "bandwidth"}), flush=True)
    answer = sys.stdin.readline()
    return json.loads(answer) if answer.strip() else None


def decodes(run: Callable[[], float], attempts: int = ATTEMPTS, ask: Callable[[], float | None] = ask_bandwidth) -> dict[str, Any]:
    """Time decode steps (`run` returns seconds a step) until the bandwidth stayed `ENOUGH` times, `attempts` times at most.

    Where nobody measures, once. A measurement's part: `decode_s` and `around_gb_s` of the attempt in the middle, and all as `decodes`.
    """
    found: list[Attempt] = []
    before = ask()
    while len(found) < (attempts if before else 1) and sum(map(steady, found)) < ENOUGH:
        seconds = run()
        found.append({"decode_s": seconds, "before_gb_s": before, "after_gb_s": (before := ask())})
    return chosen(found)


def chosen(found: list[Attempt]) -> dict[str, Any]:
    """The part of a measurement that `decodes` returns: the steady attempt in the middle by time; where there is none, the steadiest."""
    by_time = sorted(filter(steady, found), key=lambda attempt: attempt["decode_s"])
    middle = by_time[len(by_time) // 2] if by_time else min(found, key=moved)
    around = [middle[name] for name in ("before_gb_s", "after_gb_s") if middle[name] is not None]
    return {"decode_s": middle["decode_s"], "around_gb_s": around, "decodes": found}


def steady(attempt: Attempt) -> bool:
    """Whether the bandwidth stayed, as far as it is known."""
    return moved(attempt) <= STEADY


def moved(attempt: Attempt) -> float:
    """The higher bandwidth over the lower one; 1 where one of them is not known."""
    before, after = attempt["before_gb_s"], attempt["after_gb_s"]
    return max(before, after) / min(before, after) if before and after else 1.0

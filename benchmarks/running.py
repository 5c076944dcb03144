"""One engine in a process of its own, point by point, with a limit on how long a point may take."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from benchmarks.bandwidth import Bandwidth, Point
from benchmarks.engines import engine_named
from benchmarks.memory import MemoryWatch

SETTLE_SECONDS = 0.02  # threads of an engine wait for work this long before they sleep


def run_engine(
    name: str, model: str, points: Sequence[Point], settings: dict[str, Any], threads: int, limit: float, bandwidth: Bandwidth
) -> Iterator[dict[str, Any]]:
    """The rows of one engine, a point after the other as they are there. `settings`: what every engine's `run` takes besides.

    Loading, and each point, may take `limit` seconds. A point that takes longer ends the process: it is reported as `unfinished_s`, and so
    is every later one without being tried. Nor is one tried whose prompts would take longer at the pace of the one before, since a token of
    a longer prompt is no less work: `at_least_s`. An engine that fails reports its last line as `error` for what it did not measure.
    Whenever the engine asks for the bandwidth, it stands still and `bandwidth` measures here: the same for all engines. The first time at
    each point that may keep it waiting, which does not count against the limit.
    """
    engine = engine_named(name)
    python = os.environ.get(engine.python or "", sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    spec = {"points": [list(point) for point in points], **settings, **engine.options}
    command = [python, "-m", f"benchmarks.engines.{engine.module}", model, json.dumps(spec)]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            env={**environment, **engine.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        watch = MemoryWatch(process.pid)
        watch.start()
        asked = 0  # since the last measurement
        left, pace = list(points), None  # seconds a token of the last prompts, where that already says that the next ones take too long
        try:
            for row in _rows(process, limit):
                if "ask" in row:
                    _answer(process, bandwidth, None if asked or not left else left[0])
                    asked += 1
                if "context" not in row:
                    continue
                asked = 0
                left.remove(point := (row["context"], row["batch"]))
                bandwidth.met(point, row.get("around_gb_s", ()))
                yield {**row, "peak_rss_bytes": watch.peak_rss_bytes, "peak_anonymous_bytes": watch.peak_anonymous_bytes}
                if pace := pace_of_the_hopeless(row, left, limit):
                    break
            else:
                process.wait()
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            failure: dict[str, Any] = {"error": lines[-1] if lines else f"exit status {process.returncode}"}
        except TimeoutError:
            failure = {"unfinished_s": limit}
        finally:
            watch.stop()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: itself and what it started
                process.wait()
    for context, batch in left:
        yield {"context": context, "batch": batch, **({"at_least_s": pace * context * batch, "limit_s": limit} if pace else failure)}


def _answer(process: subprocess.Popen[str], bandwidth: Bandwidth, point: Point | None) -> None:
    """`point`: which the engine is about to time."""
    time.sleep(SETTLE_SECONDS)
    speed = bandwidth.now() if point is None else bandwidth.before(point)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died: what it left behind is said by `run_engine`
        print(json.dumps(speed), file=process.stdin, flush=True)


def pace_of_the_hopeless(row: Mapping[str, Any], left: Sequence[Point], limit: float) -> float | None:
    """The seconds a token that prompts took, where all that are left are longer ones and would at that pace already take too long."""
    pace = row["ttft_s"] / (row["context"] * row["batch"])
    late = [context >= row["context"] and pace * context * batch > limit for context, batch in left]
    return pace if late and all(late) else None


def _rows(process: subprocess.Popen[str], limit: float) -> Iterator[dict[str, Any]]:
    """The JSON lines that a process prints. Raises `TimeoutError` where one takes longer than `limit` seconds."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    assert process.stdout is not None
    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        if line.startswith("{"):
            yield json.loads(line)

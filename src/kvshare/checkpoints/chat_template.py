"""Chat templates, which come with a model's files and so from strangers: rendered by a child process that can neither hang nor grow.

`template_worker.py` is that process. A template may take `SECONDS` and write `MOST_CHARACTERS`; past that the worker is
killed and the request, not the engine, fails.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvshare.errors import RequestError

SECONDS = 5.0
MOST_CHARACTERS = 8_000_000
MOST_TEMPLATE_CHARACTERS = 1_000_000

_WORKER = Path(__file__).with_name("template_worker.py")
_lock = threading.Lock()
_worker: subprocess.Popen[str] | None = None


def render_template(template: str, variables: Mapping[str, Any], seconds: float = SECONDS) -> str:
    """`template` (Jinja, with Hugging Face's conventions) rendered with `variables`, which must be JSON values.

    Raises `RequestError` with the template's own complaint, or where it runs longer than `seconds` or writes more than `MOST_CHARACTERS`.
    """
    if len(template) > MOST_TEMPLATE_CHARACTERS:
        raise RequestError(f"the chat template has {len(template)} characters; at most {MOST_TEMPLATE_CHARACTERS} are accepted")
    try:
        request = json.dumps({"template": template, "variables": variables, "most_characters": MOST_CHARACTERS})
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the messages are not plain JSON values: {error}") from None
    answer = _ask(request, seconds)
    if "text" in answer:
        return answer["text"]
    raise RequestError(f"the chat template failed on these messages: {answer['error']}")


def _ask(request: str, seconds: float) -> dict[str, str]:
    """One line to the worker, one line back. A worker that is late or dies is gone for good; the next request starts another."""
    with _lock:
        worker = _running_worker()
        assert worker.stdin is not None
        assert worker.stdout is not None
        timer = threading.Timer(seconds, worker.kill)
        timer.start()
        line = ""
        with contextlib.suppress(OSError, ValueError):
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        late = not timer.is_alive()
        timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        stop_worker()
    raise RequestError(f"the chat template was stopped: it {f'took longer than {seconds:g} seconds' if late else 'used too much memory'}")


def _running_worker() -> subprocess.Popen[str]:
    global _worker
    if _worker is None or _worker.poll() is not None:
        command = [sys.executable, "-P", str(_WORKER)]  # -P: this directory's modules must not shadow the library's
        _worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )
        assert _worker.stdout is not None
        _worker.stdout.readline()  # it is ready: the time it takes to start is not the template's
    return _worker


@atexit.register
def stop_worker() -> None:
    """End the worker process, if one runs."""
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.communicate()
        _worker = None

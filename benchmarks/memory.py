"""The most memory that a process and its children held, seen from outside: the same way for every engine."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil

INTERVAL_SECONDS = 0.1
FAMILY_SECONDS = 2.0  # between two looks for new children, which cost milliseconds


class MemoryWatch(threading.Thread):
    """Samples ten times a second until `stop`. Resident memory counts mapped files too; anonymous memory does not."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak_rss_bytes, self.peak_anonymous_bytes = pid, 0, 0
        self._stopped = threading.Event()

    def run(self) -> None:
        pids, looked = [self.pid], -FAMILY_SECONDS
        while not self._stopped.wait(INTERVAL_SECONDS):
            if time.monotonic() - looked > FAMILY_SECONDS:
                try:
                    pids = [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]
                except psutil.NoSuchProcess:
                    return
                looked = time.monotonic()
            found = [held(pid) for pid in pids]
            self.peak_rss_bytes = max(self.peak_rss_bytes, sum(rss for rss, _ in found))
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, sum(anonymous for _, anonymous in found))

    def stop(self) -> None:
        self._stopped.set()


def held(pid: int) -> tuple[int, int]:
    """Bytes that a process has in memory now, and those of them that are no file's; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines) if value.endswith("kB")}
    return sizes.get("VmRSS", 0), sizes.get("RssAnon", 0)

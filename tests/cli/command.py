"""Running the `kvshare` command inside the test's process, as a shell would."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pytest

from kvshare.cli.main import main


@dataclass(frozen=True, slots=True)
class Result:
    status: int
    out: str
    err: str


class Command:
    """Call it with arguments; `stdin` is what a pipe would bring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        self.monkeypatch.setattr(sys, "argv", ["kvshare", *map(str, arguments)])
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        status = 0
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 0
        out, err = self.capsys.readouterr()
        return Result(status, out, err)

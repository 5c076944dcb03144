"""When work takes long, a bar appears on a terminal and one line elsewhere; otherwise nothing does."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvshare.checkpoints.progress import progress_bar


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (1e9, False)])
def test_those_who_wait_see_a_bar_or_one_line(patience: float, shown: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=terminal, width=80))
    with progress_bar("joining", patience) as progress:
        for done in (1, 2, 4):
            progress(1000 * done, 4000)
    assert ("joining" in screen.getvalue()) == shown
    if not terminal:
        assert screen.getvalue() == ("joining: 4.0 kB\n" if shown else "")

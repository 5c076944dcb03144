"""A progress bar appears on a terminal when work takes long, and never otherwise."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvshare.checkpoints.progress import progress_bar


@pytest.mark.parametrize(("patience", "terminal", "shown"), [(0.0, True, True), (1e9, True, False), (0.0, False, False)])
def test_a_bar_is_drawn_for_those_who_wait_at_a_terminal(patience: float, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=terminal, width=80))
    with progress_bar("joining", patience) as progress:
        progress(1, 4)
        progress(2, 4)
    assert ("joining" in screen.getvalue()) == shown

"""Stop strings cut the text at the right place however it is split into pieces, and nothing is shown too early."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvshare.engine.stopping import StopStrings


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_pieces_give_what_the_whole_text_gives(text: str, stops: list[str], data: st.DataObject) -> None:
    checker, shown, stopped, rest = StopStrings(tuple(stops)), "", None, text
    while rest and stopped is None:
        size = data.draw(st.integers(1, len(rest)))
        piece, stopped = checker.push(rest[:size])
        shown, rest = shown + piece, rest[size:]
    if stopped is None:
        assert not any(stop in text for stop in stops)
        assert shown + checker.finish() == text
    else:
        # pieces arrive in order, so the stop that is complete first wins; what was shown stands before it
        assert stopped in stops
        assert text.startswith(shown + stopped)
        assert not any(stop in shown for stop in stops)

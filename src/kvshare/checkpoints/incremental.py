"""Text from token ids that arrive one at a time: a character is given out when all of its bytes are there, never half."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_BYTES = 4  # of one character in UTF-8


class IncrementalDecoder:
    """Pieces that joined give the decoded whole. `decode` maps ids to text; the text of an id may depend on the few ids before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []  # a few ids that were given out already, for context, and those that were not
        self._given = 0  # of `_ids`, how many were given out
        self._text_given = 0  # characters of the text of `_ids` that were given out

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is still incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        pending = len(self._ids) - self._given
        if not text.endswith(_REPLACEMENT):
            piece = text[self._text_given :]
            self._ids = self._ids[self._given :]
            self._given = len(self._ids)
            self._text_given = len(self._decode(self._ids))
            return piece
        if pending < _MOST_BYTES:
            return ""
        # so many ids cannot be one character: what stands before the open end is final
        end = max(self._text_given, len(text.rstrip(_REPLACEMENT)), len(text) - (_MOST_BYTES - 1))
        piece, self._text_given = text[self._text_given : end], end
        return piece

    def finish(self) -> str:
        """What was held back, an incomplete character as U+FFFD. Call it once, after the last id."""
        piece = self._decode(self._ids)[self._text_given :]
        self._ids, self._given, self._text_given = [], 0, 0
        return piece

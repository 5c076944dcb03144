"""How one row is spelled in bytes. A codec owns the byte layout inside a page; `kvshare.layout.rows` states its size."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvshare.cache.codecs.raw import RawCodec
from kvshare.errors import RequestError
from kvshare.layout import PRECISIONS, Precision


class Codec(Protocol):
    """Turns rows into the bytes that `precision.row_bytes` promises, and back."""

    precision: Precision

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        ...

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> [rows, heads, width]
        ...


RUNNABLE = ("fp32", "fp16", "bf16")


def codec_for(precision: Precision) -> Codec:
    """The codec of a precision; `RequestError` for those that only the planner knows."""
    if precision.name not in RUNNABLE:
        raise RequestError(
            f"KV precision {precision.name}: the planner sizes it, the engine runs {', '.join(RUNNABLE)} (known: {', '.join(PRECISIONS)})"
        )
    return RawCodec(precision)

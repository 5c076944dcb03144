"""How one row is spelled in bytes. A codec owns the byte layout inside a page; `kvshare.layout.rows` states its size."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvshare.cache.codecs.deepseek import BlockFloatCodec
from kvshare.cache.codecs.raw import RawCodec
from kvshare.errors import RequestError
from kvshare.layout import PRECISIONS, Precision, Stream
from kvshare.layout.rows import NATIVE


class Codec(Protocol):
    """Turns the rows of one stream into the bytes that `stream.row_bytes(precision)` promises, and back."""

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        ...

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> [rows, heads, width]
        ...


RUNNABLE = ("fp32", "fp16", "bf16", NATIVE)


def codec_for(precision: Precision, stream: Stream) -> Codec:
    """The codec of a stream's rows; `RequestError` for precisions that only the planner knows."""
    if precision.name == NATIVE:
        return BlockFloatCodec(stream.native) if stream.native is not None else RawCodec("bf16")
    if precision.name not in RUNNABLE:
        raise RequestError(
            f"KV precision {precision.name}: the planner sizes it, the engine runs {', '.join(RUNNABLE)} (known: {', '.join(PRECISIONS)})"
        )
    return RawCodec(precision.name)

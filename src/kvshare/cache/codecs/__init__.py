"""How one row is spelled in bytes. A codec owns the byte layout inside a page; `kvshare.layout.rows` states its size."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvshare.cache.codecs.balanced import BalancedCodec
from kvshare.cache.codecs.deepseek import BlockFloatCodec
from kvshare.cache.codecs.grouped import GroupedCodec
from kvshare.cache.codecs.raw import RawCodec
from kvshare.cache.codecs.rotated import RotatedCodec, RotatedNineCodec, RotatedRawCodec, RotatedScaledCodec
from kvshare.cache.codecs.scaled import ScaledCodec
from kvshare.layout import Precision, Stream
from kvshare.layout.rows import NATIVE


class Codec(Protocol):
    """Turns the rows of one stream into the bytes that `stream.row_bytes(precision)` promises, and back."""

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        ...

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> [rows, heads, width]
        ...


def codec_for(precision: Precision, stream: Stream, balance: Tensor | None = None) -> Codec:
    """The codec of a stream's rows. Keys that lose by it are divided by `balance` first ([heads, width]), where that is given.

    Rows in 16 bits beside encoded ones are balanced and rotated like these, so that one query meets both.
    """
    if stream.newest_of == stream.name:  # all rows of a window
        return RawCodec("bf16")
    codec = _codec_named(precision.codec, stream)
    balanced = balance is not None and stream.source == "k" and not isinstance(codec, (RawCodec, BlockFloatCodec))
    if stream.newest_of is not None:
        codec = RotatedRawCodec() if isinstance(codec, RotatedCodec | RotatedNineCodec | RotatedScaledCodec) else RawCodec("bf16")
    return BalancedCodec(codec, balance) if balanced and balance is not None else codec


def _codec_named(name: str, stream: Stream) -> Codec:
    if name == NATIVE:
        return BlockFloatCodec(stream.native) if stream.native is not None else RawCodec("bf16")
    if name in ("int8", "fp8"):
        return ScaledCodec(name)
    if name == "int4":
        return GroupedCodec()
    if name == "rot8":
        return RotatedScaledCodec()
    if name == "rot9":
        return RotatedNineCodec()
    return RotatedCodec(int(name.removeprefix("rot"))) if name.startswith("rot") else RawCodec(name)

"""How one row is spelled in bytes. A codec owns the byte layout inside a page; `kvshare.layout.rows` states its size."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvshare.cache.codecs.balanced import BalancedCodec
from kvshare.cache.codecs.deepseek import BlockFloatCodec
from kvshare.cache.codecs.grouped import GroupedCodec
from kvshare.cache.codecs.raw import RawCodec
from kvshare.cache.codecs.rotated import RotatedCodec, RotatedNineCodec, RotatedScaledCodec
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
    """The codec of a stream's rows. Keys that lose by it are divided by `balance` first ([heads, width]), where that is given."""
    codec = _codec_named(precision, stream)
    if balance is None or stream.name != "k" or isinstance(codec, (RawCodec, BlockFloatCodec)):
        return codec
    return BalancedCodec(codec, balance)


def _codec_named(precision: Precision, stream: Stream) -> Codec:
    name = precision.name
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
    return RotatedCodec(precision.bits) if name.startswith("rot") else RawCodec(name)

"""Which of the kernels' row formats a codec writes, and how a kernel is told of it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.cache.codecs import Codec
from kvshare.cache.codecs.grouped import GroupedCodec
from kvshare.cache.codecs.raw import RawCodec
from kvshare.cache.codecs.rotated import RotatedCodec, RotatedNineCodec, RotatedScaledCodec, rotation
from kvshare.cache.codecs.scaled import ScaledCodec
from kvshare.kernels.native import module


class RowKind(NamedTuple):
    """The format of a stream's rows: what the bytes mean, by the kernels' name, and whether the numbers are those of rotated heads."""

    name: str
    rotated: bool = False

    @property
    def native(self) -> Any:
        return getattr(module().RowKind, self.name)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether queries of this type can meet such rows: plain numbers want their own, codes any."""
        return _RAW.get(dtype) == self if self in _RAW.values() else dtype in _RAW


_RAW = {torch.bfloat16: RowKind("BF16"), torch.float32: RowKind("FP32")}


def row_kind(codec: Codec) -> RowKind | None:
    """The format that `codec` writes; None where no kernel reads it."""
    if isinstance(codec, RawCodec):
        return _RAW.get(codec.dtype)
    if isinstance(codec, ScaledCodec):
        return RowKind("INT8" if codec.codes == torch.int8 else "FP8")
    if isinstance(codec, GroupedCodec):
        return RowKind("INT4")
    if isinstance(codec, RotatedScaledCodec):
        return RowKind("INT8", rotated=True)
    if isinstance(codec, RotatedNineCodec):
        return RowKind("INT9", rotated=True)
    return RowKind(f"LEVELS{codec.bits}", rotated=True) if isinstance(codec, RotatedCodec) else None


def decode_rows(encoded: Tensor, kind: RowKind, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows, uint8 [rows, row_bytes], as numbers [rows, heads, width] in bfloat16 or float32; those of rotated heads stay rotated."""
    assert dtype in (torch.bfloat16, torch.float32)
    assert encoded.stride(1) == 1 or len(encoded) == 0
    out = torch.empty(len(encoded), heads, width, dtype=dtype)
    module().decode_rows(
        kind.native, encoded.data_ptr(), encoded.stride(0), len(encoded), heads, width, out.data_ptr(), dtype == torch.bfloat16
    )
    return out


def stream_shape(arena: Arena, heads: int, width: int, kind: RowKind, balance: Tensor | None = None) -> Any:
    """The native description of a stream's rows in an arena's pages; `balance` [heads, width]: what keys were divided by first."""
    row_bytes = heads * module().head_bytes(kind.native, width)
    factors = [] if balance is None else balance.flatten().tolist()
    turned = _rotation(width) if kind.rotated else None
    return module().StreamShape(kind.native, width, row_bytes, arena.page_bytes // row_bytes, turned, factors)


@cache
def _rotation(width: int) -> Any:
    signs, matrix = rotation(width)
    return module().Rotation(signs.tolist(), matrix.flatten().tolist())

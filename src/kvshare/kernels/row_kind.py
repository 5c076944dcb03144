"""Which of the kernels' row formats a codec writes, and how a kernel is told of it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.cache.codecs import Codec
from kvshare.cache.codecs.balanced import BalancedCodec
from kvshare.cache.codecs.deepseek import BlockFloatCodec
from kvshare.cache.codecs.grouped import GroupedCodec
from kvshare.cache.codecs.raw import RawCodec
from kvshare.cache.codecs.rotated import RotatedCodec, RotatedNineCodec, RotatedRawCodec, RotatedScaledCodec, rotation
from kvshare.cache.codecs.scaled import ScaledCodec
from kvshare.kernels.native import available, module
from kvshare.layout.rows import BlockRow

WIDEST = 2048  # numbers in one head that the kernels take


class RowKind(NamedTuple):
    """The format of a stream's rows: what the bytes mean, by the kernels' name, and whether the numbers are those of rotated heads."""

    name: str
    rotated: bool = False
    form: BlockRow | None = None  # of DeepSeek's rows, which are named BLOCKS

    @property
    def native(self) -> int:
        """What the kernels call it."""
        if self.form is None:
            return getattr(module().RowKind, self.name).value
        form = self.form
        return module().block_kind(form.bits, form.group, form.scale_bytes, form.exact, form.align)

    @property
    def is_plain(self) -> bool:
        """Whether rows are the numbers themselves, rotated or not."""
        return self.name in ("BF16", "FP32")

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether queries of this type can meet such rows: plain numbers want their own, codes any."""
        return _RAW[dtype].name == self.name if self.is_plain and dtype in _RAW else dtype in _RAW


_RAW = {torch.bfloat16: RowKind("BF16"), torch.float32: RowKind("FP32")}


def row_kind(codec: Codec) -> RowKind | None:
    """The format that `codec` writes; None where no kernel reads it, or where queries must be changed as well (`kind_and_balance`)."""
    if isinstance(codec, RawCodec):
        return _RAW.get(codec.dtype)
    if isinstance(codec, RotatedRawCodec):
        return RowKind("BF16", rotated=True)
    if isinstance(codec, ScaledCodec):
        return RowKind("INT8" if codec.codes == torch.int8 else "FP8")
    if isinstance(codec, GroupedCodec):
        return RowKind("INT4")
    if isinstance(codec, RotatedScaledCodec):
        return RowKind("INT8", rotated=True)
    if isinstance(codec, RotatedNineCodec):
        return RowKind("INT9", rotated=True)
    if isinstance(codec, BlockFloatCodec):
        return RowKind("BLOCKS", form=codec.row)
    return RowKind(f"LEVELS{codec.bits}", rotated=True) if isinstance(codec, RotatedCodec) else None


def kind_and_balance(codec: Codec) -> tuple[RowKind | None, Tensor | None]:
    """`row_kind`, and what keys were divided by before (None: nothing), which their queries must be multiplied by."""
    return (row_kind(codec.codec), codec.balance) if isinstance(codec, BalancedCodec) else (row_kind(codec), None)


def decode_rows(encoded: Tensor, kind: RowKind, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows, uint8 [rows, row_bytes], as numbers [rows, heads, width] in bfloat16 or float32; those of rotated heads stay rotated."""
    assert dtype in (torch.bfloat16, torch.float32)
    assert encoded.stride(1) == 1 or len(encoded) == 0
    out = torch.empty(len(encoded), heads, width, dtype=dtype)
    module().decode_rows(
        kind.native, encoded.data_ptr(), encoded.stride(0), len(encoded), heads, width, out.data_ptr(), dtype == torch.bfloat16
    )
    return out


class RowEncoder:
    """A codec's `encode` in one native call. Its twin is the codec.

    Without a rotation the bytes are the codec's own. A rotation adds in another order: a code may differ by one where its number lies
    within some 2^-20 of the head's largest from a border, and a scale by a unit in its last place.
    """

    def __init__(self, kind: RowKind, heads: int, width: int, balance: Tensor | None = None):  # balance [heads, width]
        self.heads, self.width, self.row_bytes = heads, width, heads * module().head_bytes(kind.native, width)
        self._shape = _shape(kind, width, self.row_bytes, 1, balance)

    def encode(self, values: Tensor) -> Tensor:  # bfloat16 or float32 [rows, heads, width] -> uint8 [rows, row_bytes]
        assert values.shape[1:] == (self.heads, self.width)
        values = values if values.stride(2) == 1 else values.contiguous()
        out = torch.empty(len(values), self.row_bytes, dtype=torch.uint8)
        strides = values.stride(0), values.stride(1), len(values), self.heads
        module().encode_rows(self._shape, values.data_ptr(), values.dtype == torch.bfloat16, *strides, out.data_ptr())
        return out


def row_encoder(codec: Codec, heads: int, width: int) -> RowEncoder | None:
    """What encodes for `codec` natively; None where nothing does, or where rows are only cast."""
    kind, balance = kind_and_balance(codec)
    if kind is None or (kind in _RAW.values() and balance is None) or not available() or width > WIDEST:
        return None
    return RowEncoder(kind, heads, width, balance)


def stream_shape(arena: Arena, heads: int, width: int, kind: RowKind, balance: Tensor | None = None) -> Any:
    """The native description of a stream's rows in an arena's pages; `balance` [heads, width]: what keys were divided by first."""
    row_bytes = heads * module().head_bytes(kind.native, width)
    return _shape(kind, width, row_bytes, arena.page_bytes // row_bytes, balance)


def _shape(kind: RowKind, width: int, row_bytes: int, rows_per_page: int, balance: Tensor | None) -> Any:
    factors = [] if balance is None else balance.flatten().tolist()
    return module().StreamShape(kind.native, width, row_bytes, rows_per_page, _rotation(width) if kind.rotated else None, factors)


@cache
def _rotation(width: int) -> Any:
    signs, matrix = rotation(width)
    return module().Rotation(signs.tolist(), matrix.flatten().tolist())

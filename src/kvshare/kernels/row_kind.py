"""Which of the kernels' row formats a codec writes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvshare.cache.codecs import Codec
from kvshare.cache.codecs.grouped import GroupedCodec
from kvshare.cache.codecs.raw import RawCodec
from kvshare.cache.codecs.rotated import RotatedCodec, RotatedScaledCodec
from kvshare.cache.codecs.scaled import ScaledCodec
from kvshare.kernels.native import module


class RowKind(NamedTuple):
    """The format of a stream's rows: what the bytes mean, by the kernels' name, and whether the numbers are those of rotated heads."""

    name: str
    rotated: bool = False


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
    return RowKind(f"LEVELS{codec.bits}", rotated=True) if isinstance(codec, RotatedCodec) else None


def decode_rows(encoded: Tensor, kind: RowKind, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows, uint8 [rows, row_bytes], as numbers [rows, heads, width] in bfloat16 or float32; those of rotated heads stay rotated."""
    assert dtype in (torch.bfloat16, torch.float32)
    assert encoded.stride(1) == 1 or len(encoded) == 0
    out = torch.empty(len(encoded), heads, width, dtype=dtype)
    native = getattr(module().RowKind, kind.name)
    module().decode_rows(native, encoded.data_ptr(), encoded.stride(0), len(encoded), heads, width, out.data_ptr(), dtype == torch.bfloat16)
    return out

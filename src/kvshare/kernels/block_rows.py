"""Rows of a table of blocks as numbers: what an embedding looks up. The twin in plain torch is `PackedBlocks.rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.kernels.interleaved_blocks import InterleavedBlocks
from kvshare.kernels.native import available, module
from kvshare.kernels.quantized_weight import BLOCK_TYPES


def decode_rows(
    table: PackedBlocks | InterleavedBlocks,  # [entries, width]
    rows: Tensor,  # int64 [n]
    dtype: torch.dtype,
    begin: int = 0,
    end: int | None = None,
    scale: float = 1.0,
) -> Tensor:  # -> [n, end - begin]
    """Numbers `begin:end` of some rows in `dtype`, times `scale`, which is rounded to `dtype` first; the kernels decode no others.

    Raises `IndexError` for a row that is not there.

    The kernels multiply and add in one rounding: they differ from torch by at most a unit in the last place of `dtype`.
    """
    entries, width = table.shape
    end = width if end is None else end
    whole = begin % table.type.block_size == end % table.type.block_size == 0
    if not (whole and available() and table.type.name in BLOCK_TYPES and dtype in (torch.float32, torch.bfloat16)):
        if isinstance(table, InterleavedBlocks):
            return scaled(decode_rows(table, rows, torch.float32)[:, begin:end], scale, dtype)
        return scaled(table.rows(rows)[:, begin:end], scale, dtype)
    native, rows = module(), rows.contiguous()
    out = torch.empty(len(rows), end - begin, dtype=dtype)
    kind, is_bf16 = native.BlockType[table.type.name], dtype == torch.bfloat16
    places = (rows.data_ptr(), len(rows), begin, end, out.data_ptr())
    native.decode_block_rows(kind, table.blocks.data_ptr(), isinstance(table, InterleavedBlocks), entries, width, *places, is_bf16, scale)
    return out


def scaled(rows: Tensor, scale: float, dtype: torch.dtype) -> Tensor:  # [tokens, width]
    """Rows of a table times a factor, which is rounded to `dtype` first, as the models were trained."""
    return rows.to(dtype) if scale == 1 else rows.to(dtype) * torch.tensor(scale, dtype=torch.float32).to(dtype)

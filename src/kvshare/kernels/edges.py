"""The operations in front of a model's first layer and behind its last: rows of embeddings, rotations of positions, the best logit.

Their twins in plain torch are `kvshare.layers.embedding.look_up`, `kvshare.layers.rotary.Frequencies.at` and `argmax`. Rows of embeddings
are the same to the bit. Cosines and sines are rounded once, from doubles: they are at most 2^-24 off, torch's own twice as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvshare.kernels.native import available, module

_DTYPES = (torch.bfloat16, torch.float32)


def takes(numbers: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels make numbers of `dtype` of these positions or rows: int64 [n] in the CPU's memory, and no gradient wanted."""
    fits = numbers.dtype == torch.int64 and numbers.dim() == 1 and numbers.is_contiguous() and numbers.is_cpu
    return fits and dtype in _DTYPES and available() and not torch.is_grad_enabled()


def turns(positions: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # [tokens], float32 [pairs]
    """Cosine and sine of positions * inverse, times `factor`: [tokens, 1, pairs] each."""
    cos, sin = (torch.empty(len(positions), 1, len(inverse), dtype=dtype) for _ in range(2))
    places = cos.data_ptr(), sin.data_ptr(), dtype == torch.bfloat16
    module().turns(positions.data_ptr(), len(positions), inverse.data_ptr(), len(inverse), factor, *places)
    return cos, sin


def takes_table(table: Tensor, rows: Tensor, dtype: torch.dtype) -> bool:  # [entries, width], int64 [n]
    """Whether `gather` takes these."""
    return table.dtype in _DTYPES and table.is_cpu and table.stride(-1) == 1 and takes(rows, dtype)


def packed(x: Tensor) -> Tensor:  # [..., width]
    """`x` in one piece: itself, or a copy."""
    fits = x.dim() == 2 and x.stride(1) == 1 and x.dtype in _DTYPES and x.is_cpu and not x.requires_grad and available()
    if x.is_contiguous() or not fits:
        return x.contiguous()
    out, bf16 = torch.empty(x.shape, dtype=x.dtype), x.dtype == torch.bfloat16
    module().gather_rows(x.data_ptr(), bf16, x.shape[0], x.stride(0), 0, x.shape[1], 0, x.shape[0], out.data_ptr(), bf16, 1.0)
    return out


def gather(table: Tensor, rows: Tensor, dtype: torch.dtype, scale: float, begin: int, end: int) -> Tensor:  # [entries, width], [n]
    """Numbers `begin:end` of some rows, in `dtype`, times `scale`, which is rounded to `dtype` first: [n, end - begin].

    Raises `IndexError` for a row that is not there.
    """
    out = torch.empty(len(rows), end - begin, dtype=dtype)
    part = table.stride(0), begin, end - begin
    where = rows.data_ptr(), len(rows), out.data_ptr(), dtype == torch.bfloat16
    module().gather_rows(table.data_ptr(), table.dtype == torch.bfloat16, table.shape[0], *part, *where, scale)
    return out


def rows_or_first(rows: Tensor, entries: int) -> Tensor:  # int64 [n] -> [n]
    """The rows, with 0 in place of those behind a table's end."""
    if not takes(rows, torch.float32):
        return torch.where(rows < entries, rows, 0)
    out = torch.empty_like(rows)
    module().rows_or_first(rows.data_ptr(), out.data_ptr(), len(rows), entries)
    return out


def argmax(scores: Tensor) -> int:  # [n]
    """Where the largest number stands, the first of equal ones."""
    if available() and scores.is_cpu and scores.dtype == torch.float32 and scores.is_contiguous() and scores.numel():
        return module().argmax(scores.data_ptr(), scores.numel())
    return int(scores.argmax())

"""Rows as they are, in one of torch's own floating-point types: encoding is a cast and a view."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class RawCodec:
    def __init__(self, name: str):
        self.dtype = _DTYPES[name]

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        return rows.to(self.dtype).reshape(rows.shape[0], -1).view(torch.uint8)

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> [rows, heads, width]
        return encoded.view(self.dtype).unflatten(-1, (heads, width))

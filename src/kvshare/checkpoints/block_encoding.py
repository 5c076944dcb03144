"""Quantizing weights at load, into the same blocks that GGUF files use, so that one set of kernels serves both.

int8 is Q8_0 (a scale for 32 numbers: 8.5 bits each), int4 is Q4_0 (4.5 bits) with the scale that loses least among a few candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES, BlockType

GROUP = 32
_ROWS_AT_ONCE = 1024
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the scale that just holds the largest number: the others gain more than it loses


def _q8_0(groups: Tensor) -> Tensor:  # float32 [groups, 32] -> uint8 [groups, 34]
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
    codes = torch.where(scale > 0, groups / scale.float(), 0).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=-1)


def _q4_0(groups: Tensor) -> Tensor:  # float32 [groups, 32] -> uint8 [groups, 18]
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # the largest in size, with its sign: codes reach from -8 to 7
    best_error = torch.full_like(extreme, float("inf"))
    best_scale, best_codes = torch.zeros_like(extreme).half(), torch.zeros_like(groups)
    for shrink in _SHRINKS:
        scale = (extreme * (shrink / -8)).half()
        codes = torch.where(scale != 0, groups / scale.float(), 0).round().clamp(-8, 7)
        error = (codes * scale.float() - groups).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes, best_codes)
    low, high = (best_codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return torch.cat([best_scale.view(torch.uint8), low | high << 4], dim=-1)


ENCODERS: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {"int8": ("Q8_0", _q8_0), "int4": ("Q4_0", _q4_0)}
"""By the name that users give: the block type, and what turns groups of numbers into its blocks."""


def encode_blocks(weight: Tensor, precision: str) -> PackedBlocks:  # [rows, width], any floating-point type
    """`weight` in blocks of "int8" or "int4", a few rows at a time. Its width must be a multiple of 32."""
    name, encoder = ENCODERS[precision]
    form: BlockType = next(form for form in BLOCK_TYPES.values() if form.name == name)
    rows, width = weight.shape
    blocks = torch.empty(rows, width // form.block_size * form.block_bytes, dtype=torch.uint8)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = weight[start : start + _ROWS_AT_ONCE].float()
        blocks[start : start + len(part)] = encoder(part.reshape(-1, GROUP)).view(len(part), -1)
    return PackedBlocks(form, (rows, width), blocks)

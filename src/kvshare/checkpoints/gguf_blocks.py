"""Quantized blocks of GGUF files, and what numbers they stand for.

The layouts are ggml's. A block is a few 16-bit floats and packed integers; each decoder below takes whole blocks and is
vectorized over them: `[blocks, block_bytes]` uint8 in, `[blocks, block_size]` float32 out, bit for bit what ggml computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kvshare.checkpoints.gguf_header import BlockType

_NUMBERS_AT_ONCE = 1 << 15  # decoded before they are rounded to the dtype that is wanted: they stay in the cache of one core


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """A tensor as quantized blocks: rows along the last dimension of `shape`, each a whole number of blocks."""

    type: BlockType
    shape: tuple[int, ...]
    blocks: Tensor  # uint8 [rows, row_bytes], a view of the mapped file unless rows had to be reordered

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of it in `dtype`, a few rows at a time so that no float32 copy of the whole exists."""
        out = torch.empty(self.blocks.shape[0], self.shape[-1], dtype=dtype)
        step = max(1, _NUMBERS_AT_ONCE // self.shape[-1])
        for start in range(0, len(out), step):
            out[start : start + step] = self.decode(self.blocks[start : start + step])
        return out.reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        """Only the rows with these indices (of the flattened leading dimensions), in float32."""  # [n] -> [n, shape[-1]]
        return self.decode(self.blocks[indices])

    def part(self, index: int) -> PackedBlocks:
        """The `index`-th entry along the first dimension."""
        rows = prod(self.shape[1:-1])
        return PackedBlocks(self.type, self.shape[1:], self.blocks[index * rows : (index + 1) * rows])

    def as_matrix(self) -> PackedBlocks:
        """The same rows as one matrix: those of a stack one below the other."""
        return PackedBlocks(self.type, (len(self.blocks), self.shape[-1]), self.blocks)

    def reordered(self, order: Tensor) -> PackedBlocks:
        """The rows in another order: a copy. # order [rows]"""
        return PackedBlocks(self.type, self.shape, self.blocks[order])

    def decode(self, blocks: Tensor) -> Tensor:
        """Numbers of some rows of blocks, in float32."""  # uint8 [n, row_bytes] -> [n, shape[-1]]
        return DECODERS[self.type.name](blocks.reshape(-1, self.type.block_bytes)).reshape(len(blocks), self.shape[-1])


def _half(data: Tensor) -> Tensor:
    """Pairs of bytes as 16-bit floats, widened."""  # uint8 [blocks, 2 n] -> float32 [blocks, n]
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """Low halves of the bytes, then the high ones."""  # uint8 [blocks, n] -> uint8 [blocks, 2 n]
    return torch.cat((data & 0x0F, data >> 4), dim=-1)


def _bits(data: Tensor, width: int) -> Tensor:
    """Each byte cut in fields of `width` bits, lowest first."""  # uint8 [..., n] -> uint8 [..., n, 8 / width]
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)
    return (data[..., None] >> shifts) & ((1 << width) - 1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:]).float() + _half(blocks[:, 2:4])


def _q5_0(blocks: Tensor) -> Tensor:
    fifth = _bits(blocks[:, 2:6], 1).flatten(1)
    return _half(blocks[:, :2]) * ((_nibbles(blocks[:, 6:]) | fifth << 4).float() - 16)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks[:, :2])


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of a Q4_K or Q5_K block: 6-bit integers in twelve bytes, times two 16-bit floats."""  # -> 2 x [blocks, 8, 1]
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 0x3F, (rest & 0x0F) | (first >> 2) & 0x30), dim=-1)
    minima = torch.cat((second & 0x3F, (rest >> 4) | (second >> 2) & 0x30), dim=-1)
    return (_half(blocks[:, :2]) * scales.float())[..., None], (_half(blocks[:, 2:4]) * minima.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    q = _bits(blocks[:, 16:].unflatten(1, (4, 32)), 4).transpose(2, 3)  # [blocks, 4, 2, 32]
    return (scale * q.flatten(1, 2).float() - minimum).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    low = _bits(blocks[:, 48:].unflatten(1, (4, 32)), 4).transpose(2, 3).flatten(1, 2)  # [blocks, 8, 32]
    fifth = _bits(blocks[:, 16:48], 1).transpose(1, 2)  # [blocks, 8, 32]
    return (scale * (low | fifth << 4).float() - minimum).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, :128].unflatten(1, (2, 64)), 4).transpose(2, 3).reshape(-1, 8, 32)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2).transpose(2, 3).reshape(-1, 8, 32)
    scale = _half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float()  # [blocks, 16]
    q = (low | high << 4).float() - 32
    return (scale[..., None] * q.reshape(-1, 16, 16)).flatten(1)


DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""One decoder for each block type of `gguf_header.BLOCK_TYPES` that is not plain numbers."""

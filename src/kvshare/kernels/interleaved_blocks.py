"""Quantized blocks in another order of their bytes: rows by sixteens, so that a product reads one stream of whole cache lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BlockType
from kvshare.kernels.native import module

STRIP = 16  # rows whose bytes are interleaved


@dataclass(frozen=True, slots=True)
class InterleavedBlocks:
    """The bytes of `PackedBlocks`, each strip of sixteen rows in the order of csrc/interleave.h; fewer rows at the end stay as they were.

    What the kernels make of it is what they make of the blocks in the order of the file, bit for bit.
    """

    type: BlockType
    shape: tuple[int, ...]  # [out_features, in_features]
    blocks: Tensor  # uint8 [out_features, row_bytes]: whose bytes lie in which row holds only behind the last strip


def interleave(packed: PackedBlocks, place: Tensor | None = None) -> InterleavedBlocks:
    """A copy, in `place` (as many bytes) if that is given. Only where the kernels are available, and for the formats they multiply."""
    rows, width = packed.shape
    place = torch.empty_like(packed.blocks) if place is None else place.view(packed.blocks.shape)
    native = module()
    native.interleave(native.BlockType[packed.type.name], packed.blocks.data_ptr(), rows, width, place.data_ptr())
    return InterleavedBlocks(packed.type, packed.shape, place)

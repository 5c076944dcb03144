"""Embeddings whose table stays in quantized blocks: a step decodes the rows of its tokens, the head multiplies with the blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.kernels.block_rows import decode_rows
from kvshare.kernels.interleaved_blocks import InterleavedBlocks
from kvshare.kernels.quantized_weight import ActivationWidth, QuantizedWeight


class QuantizedEmbedding(nn.Module):
    """Stands in for `Embedding`; rows come out in `dtype`. As a head it rounds what it multiplies to `activations`."""

    def __init__(self, table: PackedBlocks | InterleavedBlocks, dtype: torch.dtype, activations: ActivationWidth = "int16"):
        super().__init__()
        self.table, self.dtype = table, dtype
        self.weight = QuantizedWeight((table,), activations)

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:  # [tokens] -> [tokens, width]
        return decode_rows(self.table, tokens, self.dtype, scale=scale)

    def scores(self, hidden: Tensor) -> Tensor:  # [rows, width] -> [rows, entries]
        return self.weight.matmul(hidden, dtype=torch.float32)  # the logits of two good tokens are often closer than 16 bits can tell

"""Per-layer embeddings (Gemma 3n and 4): beside the residual stream, every layer is fed a small vector of its own for each token.

    p[layer] = (RMSNorm(W x / sqrt(hidden))[layer] + sqrt(width) * table[token, layer]) / sqrt(2)

x is the token's scaled embedding. The table holds more numbers than the rest of the network, but a step reads only one row of it
for each token: it stays on disk, mapped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.mapped_rows import prefetch_rows
from kvshare.kernels import small_ops
from kvshare.kernels.block_rows import decode_rows
from kvshare.kernels.edges import rows_or_first
from kvshare.layers.embedding import look_up
from kvshare.layers.linear import Linear
from kvshare.layers.norm import RMSNorm, add_normed


class PerLayerEmbedding(nn.Module):
    """The table and the projection of all layers, packed layer by layer. Loaded from a GGUF file the table may be its quantized blocks."""

    def __init__(self, entries: int, layers: int, width: int, hidden: int, eps: float):
        super().__init__()
        self.entries, self.layers, self.width, self.hidden = entries, layers, width, hidden
        self.table: nn.Parameter | PackedBlocks = nn.Parameter(torch.empty(entries, layers * width))  # [entries, layers * width]
        self.projection = Linear(hidden, layers * width)
        self.norm = RMSNorm(width, eps)

    def forward(self, tokens: Tensor, embedded: Tensor, first: int, end: int) -> PerLayerInputs:  # [tokens], [tokens, hidden]
        """The inputs of layers `first ... end - 1`; the others cost nothing. Tokens behind the table's end (images, audio) take row 0."""
        begin, stop = first * self.width, end * self.width
        rows = rows_or_first(tokens, self.entries)
        prefetch_rows(self.table.blocks if isinstance(self.table, PackedBlocks) else self.table, rows)  # on their way during the product
        projected = small_ops.scaled(self.projection.part(embedded, begin, stop), self.hidden**-0.5)
        if isinstance(self.table, PackedBlocks):
            found = decode_rows(self.table, rows, embedded.dtype, begin, stop, self.width**0.5)
        else:
            found = look_up(self.table, rows, embedded.dtype, self.width**0.5, begin, stop)
        values = add_normed(found.view(-1, self.width), projected.view(-1, self.width), self.norm, factor=2**-0.5)
        return PerLayerInputs(self, tokens, embedded, first, values.view(len(tokens), end - first, self.width))


@dataclass(frozen=True, slots=True)
class PerLayerInputs:
    """What one step feeds to a run of layers."""

    source: PerLayerEmbedding
    tokens: Tensor  # [tokens]
    embedded: Tensor  # [tokens, hidden]
    first: int  # the layer that `values[:, 0]` is for
    values: Tensor  # [tokens, layers, width]

    def of(self, layer: int) -> Tensor:  # [tokens, width]
        return self.values[:, layer - self.first]

    def at_rows(self, rows: Tensor, layer: int) -> PerLayerInputs:
        """The inputs of `layer` and all behind it, of some of the step's tokens."""
        return self.source(self.tokens[rows], self.embedded[rows], layer, self.source.layers)

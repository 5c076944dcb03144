"""Token embeddings, which in many models are the head as well; the seam at which quantized tables take over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvshare.kernels import edges
from kvshare.kernels.block_rows import scaled
from kvshare.layers.few_rows import FewRowsProduct


class Embedding(nn.Module):
    """One row for each token of the vocabulary."""

    def __init__(self, entries: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(entries, width))  # [entries, width]
        self._few_rows = FewRowsProduct()

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:  # [tokens] -> [tokens, width]
        """Each token's row times `scale`, as `look_up`."""
        return look_up(self.weight, tokens, self.weight.dtype, scale)

    def scores(self, hidden: Tensor) -> Tensor:  # [rows, width] -> [rows, entries]
        """The product with every row: the head of a model that ties it to its embedding."""
        native = self._few_rows.of(self.weight, hidden)
        return F.linear(hidden, self.weight) if native is None else native.matmul(hidden, dtype=torch.float32)


def look_up(
    table: Tensor,  # [entries, width]
    tokens: Tensor,  # int64 [tokens]
    dtype: torch.dtype,
    scale: float = 1.0,
    begin: int = 0,
    end: int | None = None,
) -> Tensor:  # [tokens, end - begin]
    """Numbers `begin:end` of the tokens' rows in `dtype`, times `scale`, which is rounded to `dtype` first."""
    end = table.shape[1] if end is None else end
    if edges.takes_table(table, tokens, dtype):
        return edges.gather(table, tokens, dtype, scale, begin, end)
    return scaled(F.embedding(tokens, table[:, begin:end]), scale, dtype)

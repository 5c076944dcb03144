"""Token embeddings, which in many models are the head as well; the seam at which quantized tables take over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvshare.layers.few_rows import FewRowsProduct


class Embedding(nn.Module):
    """One row for each token of the vocabulary."""

    def __init__(self, entries: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(entries, width))  # [entries, width]
        self._few_rows = FewRowsProduct()

    def forward(self, tokens: Tensor) -> Tensor:  # [tokens] -> [tokens, width]
        return F.embedding(tokens, self.weight)

    def scores(self, hidden: Tensor) -> Tensor:  # [rows, width] -> [rows, entries]
        """The product with every row: the head of a model that ties it to its embedding."""
        native = self._few_rows.of(self.weight, hidden)
        return F.linear(hidden, self.weight) if native is None else native.matmul(hidden, dtype=torch.float32)

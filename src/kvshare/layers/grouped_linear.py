"""Linear layers by groups: each group of numbers has a matrix of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvshare.kernels import group_products
from kvshare.layers.few_rows import FewRowsProduct


class GroupedLinear(nn.Module):
    """y_g = W_g x_g for every group g."""

    def __init__(self, groups: int, in_features: int, out_features: int):
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))  # [groups, out_features, in_features]
        self._few_rows = FewRowsProduct()

    def forward(self, x: Tensor) -> Tensor:  # [tokens, groups, in_features] -> [tokens, groups, out_features]
        native = self._few_rows.of(self.weight.flatten(0, 1), x[:, 0]) if group_products.takes(x) else None
        if native is not None:
            return group_products.by_rows(native, x, 0, self.out_features)
        return torch.bmm(x.transpose(0, 1), self.weight.transpose(1, 2)).transpose(0, 1)

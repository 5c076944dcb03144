"""Linear layers: the seam at which quantized weights and native matrix products take over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvshare.kernels.small_ops import with_bias
from kvshare.layers.few_rows import FewRowsProduct


class Linear(nn.Module):
    """y = x Wᵀ (+ b). Several projections of the same input lie behind one another in one weight, so that one product computes them all."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))  # [out_features, in_features]
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._few_rows = FewRowsProduct()

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        return self.part(x, 0, self.out_features)

    def part(self, x: Tensor, start: int, end: int) -> Tensor:  # [..., in_features] -> [..., end - start]
        """Only outputs `start:end`: one of the projections that lie together."""
        bias = None if self.bias is None else self.bias[start:end]
        native = self._few_rows.of(self.weight, x)
        if native is None:
            return F.linear(x, self.weight[start:end], bias)
        out = native.matmul(x, start, end)
        return out if bias is None else with_bias(out, bias)

    def scores(self, hidden: Tensor) -> Tensor:  # [rows, in_features] -> [rows, out_features]
        """What it gives as a head: logits, in float32 where that costs nothing."""
        native = self._few_rows.of(self.weight, hidden)
        return self(hidden) if native is None or self.bias is not None else native.matmul(hidden, dtype=torch.float32)


class RouterLinear(Linear):
    """A linear layer by whose outputs a router chooses. Its weight is small and decides, so it is never kept in quantized blocks."""

    def precise(self, x: Tensor) -> Tensor:  # [tokens, in_features] -> at least float32 [tokens, out_features]
        """The product, without a bias, as it is before it is rounded to x's type."""
        native = self._few_rows.of(self.weight, x)
        if native is not None:
            return native.matmul(x, dtype=torch.float32)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype))

"""What multi-head latent attention makes of a latent: keys K_h c and values V_h c of every head h, absorbed into queries and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvshare.kernels import group_products, small_ops
from kvshare.layers.few_rows import FewRowsProduct


class LatentExpansion(nn.Module):
    """K_h above V_h, for all heads."""

    def __init__(self, heads: int, key_width: int, value_width: int, rank: int):
        super().__init__()
        self.sizes = key_width, value_width
        self.weight = nn.Parameter(torch.empty(heads, key_width + value_width, rank))  # [heads, key_width + value_width, rank]
        self._few_rows = FewRowsProduct()

    def absorbed(self, q: Tensor) -> Tensor:  # [tokens, heads, key_width] -> [tokens, heads, rank]
        """K_h^T q_h."""
        keys = self.weight[:, : self.sizes[0]]
        if group_products.takes(q) and q.dtype == keys.dtype:
            out = q.new_empty(*q.shape[:2], keys.shape[2])
            group_products.by_columns(q, keys, out)
            return out
        return torch.bmm(q.transpose(0, 1), keys).transpose(0, 1)

    def values(self, summed: Tensor) -> Tensor:  # [tokens, heads, rank] -> [tokens, heads, value_width]
        """V_h times what the attention of head h has summed up."""
        native = self._few_rows.of(self.weight.flatten(0, 1), summed[:, 0]) if group_products.takes(summed) else None
        if native is not None:
            return group_products.by_rows(native, summed, self.sizes[0], sum(self.sizes))
        return torch.bmm(summed.transpose(0, 1), self.weight[:, self.sizes[0] :].transpose(1, 2)).transpose(0, 1)


def joined(*parts: Tensor) -> Tensor:  # [tokens, heads, a], [tokens, heads, b], ... -> [tokens, heads, a + b + ...]
    """Heads of several parts side by side."""
    if all(small_ops.takes(part) and part.dtype == parts[0].dtype for part in parts):
        return small_ops.join(parts)
    return torch.cat(parts, dim=-1)

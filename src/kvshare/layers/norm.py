"""Root-mean-square norm (Zhang and Sennrich 2019), with or without a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), computed in float32. Gemma 3 checkpoints store weight - 1 (`offset` 1); a norm may have no weight."""

    def __init__(self, width: int, eps: float, weighted: bool = True, offset: float = 0.0):
        super().__init__()
        self.shape, self.eps, self.offset = (width,), eps, offset
        self.weight = nn.Parameter(torch.empty(width)) if weighted else None  # [width]

    def forward(self, x: Tensor) -> Tensor:  # [..., width]
        if self.weight is None or (not self.offset and self.weight.dtype == x.dtype):
            return F.rms_norm(x, self.shape, self.weight, self.eps)  # torch computes 16-bit types in float32 inside
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.shape, self.weight.to(precise) + self.offset, self.eps).to(x.dtype)

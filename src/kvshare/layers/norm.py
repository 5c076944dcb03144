"""Root-mean-square norm (Zhang and Sennrich 2019), with or without a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), computed in float32. Gemma 3 checkpoints store weight - 1 (`offset` 1); a norm may have no weight."""

    def __init__(self, width: int, eps: float, weighted: bool = True, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(width)) if weighted else None  # [width]

    def forward(self, x: Tensor) -> Tensor:  # [..., width]
        precise = x if x.dtype == torch.float64 else x.float()
        scaled = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            weight = self.weight.to(precise.dtype)
            scaled = scaled * (weight + self.offset if self.offset else weight)
        return scaled.to(x.dtype)

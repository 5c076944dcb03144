"""Root-mean-square norm (Zhang and Sennrich 2019), with or without a weight, and the residual sums around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvshare.kernels import small_ops


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), computed in float32. Gemma 3 checkpoints store weight - 1 (`offset` 1); a norm may have no weight."""

    def __init__(self, width: int, eps: float, weighted: bool = True, offset: float = 0.0):
        super().__init__()
        self.shape, self.eps, self.offset = (width,), eps, offset
        self.weight = nn.Parameter(torch.empty(width)) if weighted else None  # [width]

    def forward(self, x: Tensor) -> Tensor:  # [..., width]
        if small_ops.takes(x):
            return small_ops.rms_norm(x, self.spelled())
        if self.weight is None or (not self.offset and self.weight.dtype == x.dtype):
            return F.rms_norm(x, self.shape, self.weight, self.eps)  # torch computes 16-bit types in float32 inside
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.shape, self.weight.to(precise) + self.offset, self.eps).to(x.dtype)

    def spelled(self) -> small_ops.Norm:
        """What the kernels are told."""
        return small_ops.norm_of(self.weight, self.offset, self.eps)


class LayerNorm(nn.LayerNorm):
    """With weight and bias (Ba et al. 2016)."""

    def forward(self, input: Tensor) -> Tensor:  # [tokens, width]
        if small_ops.takes(input) and self.weight.dtype == input.dtype:
            return small_ops.layer_norm(input, self.weight, self.bias, self.eps)
        return super().forward(input)


def add_normed(
    x: Tensor, y: Tensor, norm: RMSNorm, scale: Tensor | None = None, factor: float = 1.0
) -> Tensor:  # [tokens, width] each, scale [1]
    """The residual x + norm(y), times `scale` where there is one, or times `factor`."""
    if small_ops.takes(x) and (scale is None or scale.dtype == x.dtype):
        return small_ops.add(x, y, of_y=norm.spelled(), scale=scale, factor=factor)
    return _times(x + norm(y), factor if scale is None else scale)


def add(x: Tensor, y: Tensor) -> Tensor:  # [tokens, width] each
    """The residual x + y."""
    return small_ops.add(x, y, of_y=None) if small_ops.takes(x) and y.dtype == x.dtype else x + y


def add_then_norm(
    x: Tensor, y: Tensor, norm: RMSNorm, y_norm: RMSNorm | None = None, factor: float = 1.0
) -> tuple[Tensor, Tensor]:  # [tokens, width] each
    """The residual (x + y) * factor, with y normed first where there is a norm for it; and what `norm` makes of that."""
    if small_ops.takes(x):
        return small_ops.add_and_norm(x, y, norm.spelled(), of_y=None if y_norm is None else y_norm.spelled(), factor=factor)
    total = x + (y if y_norm is None else y_norm(y))
    total = _times(total, factor)
    return total, norm(total)


def _times(x: Tensor, factor: Tensor | float) -> Tensor:
    return x * factor if isinstance(factor, Tensor) or factor != 1.0 else x


def scaled(x: Tensor, weight: Tensor, factor: float) -> Tensor:  # [tokens, width], [width]
    """x * weight * factor."""
    if small_ops.takes(x) and weight.dtype == x.dtype:
        return small_ops.channels(x, weight=weight, factor=factor)
    return x * weight * factor


def add_scaled(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:  # [tokens, width] each, weight [width]
    """x + y * weight."""
    if small_ops.takes(y) and x.dtype == y.dtype == weight.dtype:
        return small_ops.channels(y, weight=weight, plus=x.contiguous())
    return x + y * weight

"""Kernels beside their twins in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [2, 7, 64, 250, 576, 2049]
BOUNDS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}  # of the numbers that went in; bfloat16: a unit in the last place

Both = Callable[..., tuple[Tensor, Tensor]]
"""What the fixture `both` is."""


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(dtype)


def assert_equal(native: Tensor, twin: Tensor, size: Tensor | float = 0.0) -> None:
    """Within the bound of the result, or of `size` where that is more; in bfloat16 nearly everywhere the very same."""
    assert (native.dtype, native.shape) == (twin.dtype, twin.shape)
    bound = BOUNDS[twin.dtype] * torch.maximum(twin.double().abs(), torch.as_tensor(size, dtype=torch.float64))
    assert ((native.double() - twin.double()).abs() <= bound).all()
    if twin.dtype == torch.bfloat16:  # behind 1 - tanh(large) torch's own numbers are noise
        assert ((native != twin) & (twin.abs() > 0.01)).sum() <= 1 + 0.01 * twin.numel()

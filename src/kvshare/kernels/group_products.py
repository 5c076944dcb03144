"""Products of a few rows with matrices of their own for each group of their numbers, in one native call. The twin is `torch.bmm`.

Sums are made in float32 in another order: results differ by at most 2^-20 of the sum of |x| |w|, before they are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvshare.kernels import small_ops
from kvshare.kernels.native import module
from kvshare.kernels.quantized_weight import QuantizedWeight

FEW_ROWS = 32  # with more, torch's product is as fast


def takes(x: Tensor) -> bool:  # [rows, groups, inputs]
    return x.dim() == 3 and 0 < x.shape[0] <= FEW_ROWS and small_ops.takes(x)


def by_rows(weight: QuantizedWeight, x: Tensor, begin: int, end: int) -> Tensor:  # [rows, groups, inputs] -> [rows, groups, end - begin]
    """x W_gᵀ, with W_g rows `begin:end` of the g-th of equal parts of `weight`."""
    rows, groups, inputs = x.shape
    step = weight.out_features // groups
    if inputs != weight.in_features or weight.out_features % groups or not 0 <= begin < end <= step:
        raise ValueError(f"{groups} parts of a weight {[weight.out_features, weight.in_features]} for {list(x.shape)}")
    out = x.new_empty(rows, groups, end - begin)
    places = x.data_ptr(), x.stride(0), x.stride(1), x.dtype == torch.bfloat16, rows, groups
    module().multiply_groups(weight.native, *places, begin, step, end - begin, out.data_ptr())
    return out


def by_columns(x: Tensor, weight: Tensor, out: Tensor) -> None:  # [rows, groups, inputs], [groups, inputs, outputs]
    """out = x W_g: `weight` is of x's type, and each of its groups in one piece; `out` [rows, groups, outputs] may have strides."""
    rows, groups, inputs = x.shape
    fits = weight.shape[:2] == (groups, inputs) and weight.dtype == x.dtype == out.dtype and out.shape == (rows, groups, weight.shape[2])
    if not fits or weight.stride()[1:] != (weight.shape[2], 1) or out.stride(2) != 1:
        raise ValueError(f"{x.dtype} {list(x.shape)} by {weight.dtype} {list(weight.shape)} into {list(out.shape)}")
    places = x.data_ptr(), x.stride(0), x.stride(1), weight.data_ptr(), weight.stride(0), out.data_ptr(), out.stride(0), out.stride(1)
    module().spread(*places, x.dtype == torch.bfloat16, rows, groups, inputs, weight.shape[2])

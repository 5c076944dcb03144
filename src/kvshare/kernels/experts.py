"""A few rows through the experts that their router chose, in one native call that reads no other expert's weights.

The twin in plain torch is `kvshare.layers.experts.Experts`. What lies between the products is rounded where torch rounds it: results
differ by the products' order of summation (2^-20 of the sum of |x| |w|, before 16-bit numbers are rounded).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvshare.kernels import small_ops
from kvshare.kernels.native import module
from kvshare.kernels.quantized_weight import QuantizedWeight

MOST_ROWS = 64  # of a decode step; of more, an expert has so many that a product of torch's is as fast


def takes(x: Tensor) -> bool:  # [tokens, hidden]
    """Whether `run` takes these rows."""
    return x.dim() == 2 and 0 < x.shape[0] <= MOST_ROWS and small_ops.takes(x)


def run(
    gate_up: QuantizedWeight,  # [experts * 2 * intermediate, hidden], of each expert its gates first
    down: QuantizedWeight,  # [experts * hidden, intermediate]
    x: Tensor,  # [tokens, hidden]
    chosen: Tensor,  # [tokens, k] int64; `num_experts` stands for no expert
    weights: Tensor,  # [tokens, k], of x's type or float32
    num_experts: int,
    activation: small_ops.Activation,
    scale: float,
    beside: Tensor | None,  # [tokens, hidden]
) -> Tensor:  # [tokens, hidden]
    """scale * sum of weights * experts + beside. Raises `IndexError` for an expert that is not there."""
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
    beside = None if beside is None else beside.contiguous()
    (rows, hidden), k, bf16 = x.shape, chosen.shape[1], x.dtype == torch.bfloat16
    fits = (
        gate_up.in_features == hidden
        and down.out_features == num_experts * hidden
        and gate_up.out_features == 2 * num_experts * down.in_features
    )
    if not fits or chosen.dtype != torch.int64 or weights.shape != chosen.shape or weights.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"rows {list(x.shape)}, choices {list(chosen.shape)} and weights in {weights.dtype} do not fit {num_experts} experts"
        )
    if beside is not None and (beside.shape, beside.dtype) != (x.shape, x.dtype):
        raise ValueError(f"{beside.dtype} {list(beside.shape)} cannot be added to {x.dtype} {list(x.shape)}")
    out = torch.empty_like(x)
    choice = chosen.data_ptr(), weights.data_ptr(), weights.dtype == torch.bfloat16
    last = activation, scale, 0 if beside is None else beside.data_ptr(), out.data_ptr()
    module().experts(gate_up.native, down.native, x.data_ptr(), bf16, rows, k, num_experts, *choice, *last)
    return out

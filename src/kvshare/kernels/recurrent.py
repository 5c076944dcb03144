"""Layers that carry a state from token to token, for steps of one token a sequence: each decides by its position what it does.

The twins in plain torch are `kvshare.layers.compressor` and `kvshare.layers.causal_conv`, with `kvshare.models.zaya`. 16-bit numbers are
rounded wherever torch rounds them; sums are made in another order, and the exponential has a relative error below 2^-22: float32 results
differ by at most 2^-18 of the largest number that went in, bfloat16 ones by a unit in the last place, or as much of what a rounding
border decided on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvshare.kernels import small_ops
from kvshare.kernels.native import module
from kvshare.kernels.step_states import StateInPlace


def block_starts(positions: Tensor, ratio: int) -> Tensor:  # int64 [tokens], in one piece
    """The first position of the block of `ratio` tokens that each is in."""
    assert positions.dtype == torch.int64
    assert positions.is_contiguous()
    out = torch.empty_like(positions)
    module().block_starts(positions.data_ptr(), len(positions), ratio, out.data_ptr())
    return out


def compressed(
    kv: Tensor,  # [sequences, projected], as is
    gate: Tensor,
    states: tuple[StateInPlace, StateInPlace],  # float32 [lead + ratio, projected], of values and of gates
    place_bias: Tensor,  # float32 [ratio, projected]
    norm: small_ops.Norm,
    cos: Tensor,  # float32 [sequences, 1, pairs], of the first position of each token's block
    sin: Tensor,
    *,
    overlap: bool,
) -> Tensor:  # [sequences, 1, width]
    """One token a sequence joins its open block; the entry of a block that it completes, and zeros where it completes none."""
    ratio, projected = place_bias.shape
    width = projected // 2 if overlap else projected
    if (
        kv.dtype != gate.dtype
        or place_bias.dtype != torch.float32
        or not (place_bias.is_contiguous() and cos.is_contiguous() and sin.is_contiguous())
    ):
        raise ValueError(f"a compressor of {kv.dtype} and {gate.dtype} rows with a bias in {place_bias.dtype}")
    out = torch.empty(len(kv), 1, width, dtype=kv.dtype)
    values, gates = states
    rows = kv.dtype == torch.bfloat16, (kv.data_ptr(), kv.stride(0)), (gate.data_ptr(), gate.stride(0)), place_bias.data_ptr()
    turn = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
    module().compressor(*values.spans.where, values.place, gates.place, *rows, ratio, width, overlap, norm, turn, out.data_ptr())
    return out


class ConvolvedHeads(NamedTuple):
    """What compressed convolutional attention mixes queries and keys with (`kvshare.models.zaya`), of one type."""

    query_heads: int
    kv_heads: int
    width: int
    depthwise: Tensor  # [taps, channels]
    depthwise_bias: Tensor  # [channels]
    grouped: Tensor  # [heads, grouped taps * width, width]
    grouped_bias: Tensor  # [heads, 1, width]
    temperature: Tensor  # [kv_heads]

    def takes(self, x: Tensor) -> bool:
        fits = self.width <= module().WIDEST_UNIT and all(weight.is_contiguous() and weight.dtype == x.dtype for weight in self[3:])
        return fits and small_ops.takes(x) and x.is_contiguous()


def convolved(
    x: Tensor,  # [sequences, channels + 2 * half]: queries and keys, current values, delayed values
    weights: ConvolvedHeads,
    conv: StateInPlace,  # [channels, taps + grouped taps - 2]
    delayed: StateInPlace,  # [half]
    first_delayed: Tensor | None,  # [half] what stands before the first token of a sequence; None: zeros
) -> tuple[Tensor, Tensor]:  # [sequences, heads, width], [sequences, 2 * half]
    """Queries and keys of one token a sequence, not rotated yet, and its values: the current ones, and those that the token before left."""
    heads, taps = weights.query_heads + weights.kv_heads, len(weights.depthwise)
    grouped_taps = weights.grouped.shape[1] // weights.width
    half = (x.shape[1] - heads * weights.width) // 2
    qk, values = x.new_empty(len(x), heads, weights.width), x.new_empty(len(x), 2 * half)
    shape = half, taps, grouped_taps, weights.query_heads, weights.kv_heads, weights.width
    depthwise = weights.depthwise.data_ptr(), weights.depthwise_bias.data_ptr()
    grouped = weights.grouped.data_ptr(), weights.grouped_bias.data_ptr()
    states = conv.place, delayed.place, conv.dtype == torch.bfloat16
    first = 0 if first_delayed is None else first_delayed.data_ptr()
    addresses = weights.temperature.data_ptr(), first, qk.data_ptr(), values.data_ptr()
    module().cca(*conv.spans.where, *states, x.dtype == torch.bfloat16, x.data_ptr(), shape, depthwise, grouped, *addresses)
    return qk, values


def scaled_residual(
    x: Tensor,  # [rows, width]
    residual: Tensor,  # float32 [rows, width]
    of_x: tuple[Tensor, Tensor],  # bias and scale, float32 [width] each
    of_residual: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # [rows, width] each
    """(x + bias) * scale + (residual + bias') * scale' in float32, and the same in x's type."""
    x, residual = x.contiguous(), residual.contiguous()
    total, rounded = torch.empty_like(residual), torch.empty_like(x)
    pairs = [(bias.data_ptr(), scale.data_ptr()) for bias, scale in (of_x, of_residual)]
    module().scaled_residual(
        x.data_ptr(), residual.data_ptr(), *pairs, total.data_ptr(), rounded.data_ptr(), x.dtype == torch.bfloat16, *x.shape
    )
    return total, rounded

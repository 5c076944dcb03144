"""The operations between the products in one native call each: norms, rotations, activations, sums, the cap of logits.

Their twins in plain torch are the layers' own (`kvshare.layers.norm`, `rotary`, `activations`), which run where `takes` says no. The
kernels compute in float32 and round to bfloat16 wherever torch does. They differ in the order of a norm's sum and in the exponential
(relative error below 2^-22): in float32 by at most 2^-20 of the result (and of the numbers that were added or rotated into it), in
bfloat16 by a unit in the last place where the unrounded number lay that close to the middle. A row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvshare.kernels.edges import packed
from kvshare.kernels.native import available, isa, module

_FEW_ROWS = 16  # as many as decode steps of a batch have
_DTYPES = (torch.bfloat16, torch.float32)


Norm = tuple[int, bool, float, float]
"""A norm as the kernels know it: `norm_of`. Its weight must outlive the call."""

_NO_NORM = (0, False, 0.0, -1.0)


def norm_of(weight: Tensor | None, offset: float, eps: float) -> Norm:  # [width], bfloat16 or float32
    """x / rms(x) * (offset + weight); no weight is a weight of 1."""
    if weight is None:
        return 0, False, 0.0, eps
    assert weight.dtype in _DTYPES
    return weight.data_ptr(), weight.dtype == torch.bfloat16, offset, eps


def takes(x: Tensor) -> bool:
    """Whether the kernels compute with `x`: bfloat16 or float32 in the CPU's memory, numbers in one piece, and no gradient wanted."""
    return x.dtype in _DTYPES and x.is_cpu and available() and not torch.is_grad_enabled() and x.stride(-1) == 1


def rms_norm(x: Tensor, norm: Norm) -> Tensor:  # [..., width]
    """`norm` of `x`."""
    if x.dim() == 2:
        return _heads(x, x.shape[0], 1, x.stride(0), 0, norm)
    if x.dim() == 3:
        return _heads(x, x.shape[0], x.shape[1], x.stride(0), x.stride(1), norm)
    return rms_norm(x.reshape(-1, x.shape[-1]), norm).view(x.shape)


def rotate(
    x: Tensor,  # [tokens, heads, width]
    cos: Tensor,  # [tokens, 1, pairs], in x's dtype or float32, in one piece
    sin: Tensor,
    *,
    interleaved: bool,
    norm: Norm | None = None,
) -> Tensor:  # [tokens, heads, width]
    """Heads, normed first if there is a norm, rotated by pairs: (i, i + pairs) of the first ones, interleaved (2i, 2i + 1) of the last."""
    turns = cos.data_ptr(), sin.data_ptr(), cos.dtype != x.dtype, cos.shape[-1], interleaved
    return _heads(x, x.shape[0], x.shape[1], x.stride(0), x.stride(1), norm or _NO_NORM, turns)


_NO_TURN = (0, 0, False, 0, False)


def _heads(
    x: Tensor, rows: int, heads: int, row_stride: int, head_stride: int, norm: Norm, turns: tuple[int, int, bool, int, bool] = _NO_TURN
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    bf16, width = x.dtype == torch.bfloat16, x.shape[-1]
    module().heads(x.data_ptr(), out.data_ptr(), bf16, rows, row_stride, heads, head_stride, width, norm, *turns)
    return out


def add(
    x: Tensor, y: Tensor, *, of_y: Norm | None, scale: Tensor | None = None, factor: float = 1.0
) -> Tensor:  # [rows, width] each, scale [1]
    """(x + of_y(y)) * scale, or * factor."""
    return _sum(x, y, of_y, None, scale, factor)[0]


def add_and_norm(
    x: Tensor, y: Tensor, norm: Norm, *, of_y: Norm | None, factor: float = 1.0
) -> tuple[Tensor, Tensor]:  # [rows, width] each
    """(x + of_y(y)) * factor, and `norm` of it."""
    return _sum(x, y, of_y, norm, None, factor)


def _sum(
    x: Tensor, y: Tensor, of_y: Norm | None, norm: Norm | None, scale: Tensor | None, factor: float = 1.0
) -> tuple[Tensor, Tensor]:  # a `scale` takes the factor's place
    if x.shape != y.shape or x.dtype != y.dtype or (scale is not None and scale.dtype != x.dtype):
        raise ValueError(f"{x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)} cannot be added")
    x, y = packed(x), packed(y)
    total = torch.empty_like(x)
    normed = total if norm is None else torch.empty_like(x)
    addresses = x.data_ptr(), y.data_ptr(), total.data_ptr(), normed.data_ptr()
    norms, scale_at = (of_y or _NO_NORM, norm or _NO_NORM), 0 if scale is None else scale.data_ptr()
    module().sum(*addresses, x.dtype == torch.bfloat16, *x.shape, *norms, scale_at, factor)
    return total, normed


def takes_gates(gate: Tensor, up: Tensor) -> bool:
    """Whether `gated` takes these: `takes`, two matrices of one type, and not many rows where torch's exponential is the faster one."""
    if gate.shape[0] > _FEW_ROWS and isa() not in ("amx", "avx512"):
        return False
    return takes(gate) and gate.dim() == 2 and gate.dtype == up.dtype and gate.shape == up.shape and up.stride(-1) == 1


Activation = tuple[bool, float, float]
"""Whether GELU (SiLU otherwise), the limit and the deviations of a `kvshare.layers.activations.GatedActivation`."""


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:  # [rows, width] each
    """activation(gate) * up. Where gates lose their mean, that may be a unit in the last place off, as it is a sum in another order."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    addresses = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    rows, width = gate.shape
    module().gate(*addresses, gate.dtype == torch.bfloat16, rows, gate.stride(0), up.stride(0), width, activation)
    return out


def softplus_gate(x: Tensor, gate: Tensor) -> Tensor:  # [tokens, heads, width], [tokens, heads] or [tokens, heads * width]
    """x * softplus(gate): a gate a head, or one for each of its numbers."""
    x, gate = x.contiguous(), gate.contiguous()
    tokens, heads, width = x.shape
    out, per_head = torch.empty_like(x), gate.shape[1] == heads
    if gate.dtype != x.dtype or gate.numel() * (width if per_head else 1) != x.numel():
        raise ValueError(f"{gate.dtype} gates {list(gate.shape)} do not fit heads {list(x.shape)} in {x.dtype}")
    module().softplus_gate(x.data_ptr(), gate.data_ptr(), out.data_ptr(), x.dtype == torch.bfloat16, tokens, heads, width, per_head)
    return out


def scaled(x: Tensor, factor: float) -> Tensor:  # [rows, width]; may be changed in place
    """x * factor."""
    return _affine(x, None, factor) if takes(x) and x.is_contiguous() else x * factor


def with_bias(x: Tensor, bias: Tensor) -> Tensor:  # [..., width], [width]; x is changed in place
    """x + bias."""
    if takes(x) and x.is_contiguous() and bias.dtype == x.dtype and bias.is_contiguous():
        return _affine(x, bias, 1.0)
    return x.add_(bias)


def _affine(x: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    width, bias_at = x.shape[-1], 0 if bias is None else bias.data_ptr()
    module().affine(x.data_ptr(), x.dtype == torch.bfloat16, x.numel() // max(1, width), width, bias_at, factor)
    return x


def channels(
    x: Tensor,  # [rows, width], as are
    *,
    gelu: bool = False,  # with the error function
    weight: Tensor | None = None,  # [width]
    factor: float = 1.0,
    plus: Tensor | None = None,
) -> Tensor:  # [rows, width]
    """gelu(x) * weight * factor + plus, each step rounded and those not asked for left out. All of one type."""
    given = [each for each in (weight, plus) if each is not None]
    if any(each.dtype != x.dtype or not each.is_contiguous() for each in given):
        raise ValueError(f"{x.dtype} {list(x.shape)} with {[(each.dtype, list(each.shape), each.stride()) for each in given]}")
    x = x.contiguous()
    out = torch.empty_like(x)
    weight_at, plus_at = (0 if each is None else each.data_ptr() for each in (weight, plus))
    places = x.data_ptr(), gelu, weight_at, factor, plus_at, out.data_ptr()
    module().channels(*places, x.dtype == torch.bfloat16, x.numel() // x.shape[-1], x.shape[-1])
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # [rows, width], [width] each, of one type
    """(x - mean) / deviation * weight + bias."""
    if x.dim() != 2 or not weight.dtype == bias.dtype == x.dtype:
        raise ValueError(f"a layer norm in {weight.dtype} and {bias.dtype} of {x.dtype} {list(x.shape)}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    weights = weight.data_ptr(), bias.data_ptr(), eps
    module().layer_norm((x.data_ptr(), x.stride(0)), *weights, out.data_ptr(), x.dtype == torch.bfloat16, *x.shape)
    return out


def join(parts: Sequence[Tensor]) -> Tensor:  # [tokens, heads, a], [tokens, heads, b], ... of one type
    """Their numbers side by side: [tokens, heads, a + b + ...]."""
    rows, heads = parts[0].shape[:2]
    if any(part.shape[:2] != (rows, heads) or part.dtype != parts[0].dtype or part.stride(-1) != 1 for part in parts):
        raise ValueError(f"{[(part.dtype, list(part.shape)) for part in parts]} cannot stand side by side")
    out = torch.empty(rows, heads, sum(part.shape[2] for part in parts), dtype=parts[0].dtype)
    places = [(part.data_ptr(), *part.stride()[:2], part.shape[2]) for part in parts]
    module().join(places, out.data_ptr(), out.element_size(), rows, heads)
    return out


def cap_(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place: float32 in one piece. Differs from torch by at most 2^-21 cap."""
    module().cap(x.data_ptr(), x.numel(), cap)
    return x

"""Several residual streams, mixed in one native call each: AltUp's (Gemma 3n) and manifold-constrained hyper-connections (DeepSeek V4).

The twins in plain torch are `kvshare.layers.altup` and `kvshare.layers.hyper_connections`. 16-bit numbers are rounded wherever torch
rounds them; float32 results differ by at most 2^-18 of the largest number that went in (sums of thousands of squares or products in
another order), bfloat16 ones by a unit in the last place, or as much of what a rounding border decided on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvshare.kernels import small_ops
from kvshare.kernels.native import module

FEW_ROWS = 64  # as many as a decode step has at most; with more, torch's product is the faster way to `read`
_MOST_STREAMS = 8


def takes(x: Tensor, *weights: Tensor) -> bool:  # [tokens, streams, width], all of one type
    """Whether the kernels mix these streams, with weights that lie in one piece."""
    fits = x.dim() == 3 and x.shape[1] <= _MOST_STREAMS and x.is_contiguous()
    return fits and small_ops.takes(x) and all(weight.is_contiguous() for weight in weights)


def predicted(x: Tensor, routed: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """x + M x, with M = matrix . tanh(routed * scale).

    `x` [tokens, streams, width], `routed` [tokens, streams], `matrix` [streams * streams, streams], all of one type.
    """
    out, routed = torch.empty_like(x), _like(x, routed)
    addresses = x.data_ptr(), routed.data_ptr(), _like(x, matrix).data_ptr(), out.data_ptr()
    module().altup_predict(*addresses, x.dtype == torch.bfloat16, *x.shape, scale)
    return out


def corrected(
    x: Tensor,  # [tokens, streams, width]
    active: Tensor,  # [tokens, width]
    routed: Tensor,  # [tokens, streams]
    matrix: Tensor,  # [streams, streams]
    gain: Tensor | None,  # [width]
    scale: float,
) -> tuple[Tensor, Tensor]:  # [tokens, streams, width], [tokens, width]
    """x + (active - x_0) (matrix . tanh(routed * scale) + 1) stream by stream, and the first of these times `gain`."""
    active, routed = _like(x, active), _like(x, routed)
    out, seen = torch.empty_like(x), torch.empty_like(active)
    weights = _like(x, matrix).data_ptr(), active.data_ptr(), 0 if gain is None else _like(x, gain).data_ptr()
    module().altup_correct(
        x.data_ptr(), routed.data_ptr(), *weights, out.data_ptr(), seen.data_ptr(), x.dtype == torch.bfloat16, *x.shape, scale
    )
    return out, seen


def add_behind_first_(x: Tensor, y: Tensor, norm: small_ops.Norm) -> Tensor:  # [tokens, streams, width], [tokens, width]
    """norm(y) added, in place, to all streams but the first."""
    y = _like(x, y)
    module().add_to_streams(x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, *x.shape, norm)
    return x


def at_magnitude(first: Tensor, others: Sequence[Tensor], *, mean: bool) -> Tensor:  # [tokens, width] each
    """`first`, and behind it the others with its root mean square [tokens, streams, width]; or the mean of all these [tokens, width]."""
    if any(other.stride() != (others[0].stride(0), 1) for other in others):
        others = [other.contiguous() for other in others]
    tokens, width = first.shape
    out = first.new_empty((tokens, width) if mean else (tokens, len(others) + 1, width))
    addresses = [other.data_ptr() for other in others]
    is_bf16 = first.dtype == torch.bfloat16
    module().at_magnitude(first.data_ptr(), first.stride(0), addresses, others[0].stride(0), out.data_ptr(), is_bf16, tokens, width, mean)
    return out


def read(
    x: Tensor,  # [tokens, streams, width]
    fn: Tensor,  # float32 [weights, streams * width]
    base: Tensor,  # float32 [weights]
    scale: Tensor,  # float32 [3]; [1] where the streams are only read
    norm: small_ops.Norm,
    *,
    iterations: int,  # of Sinkhorn's; 0: the streams are only read
    rms_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [tokens, width], float32 [tokens, streams], float32 [tokens, streams, streams]
    """What a block reads of the streams, normed, and the weights with which it writes to them and mixes them."""
    tokens, streams, width = x.shape
    out = x.new_empty(tokens, width)
    post, comb = x.new_empty(tokens, streams, dtype=torch.float32), x.new_empty(tokens, streams, streams, dtype=torch.float32)
    weights = fn.data_ptr(), base.data_ptr(), scale.data_ptr()
    written = (post.data_ptr(), comb.data_ptr()) if iterations else (0, 0)
    is_bf16 = x.dtype == torch.bfloat16
    module().hyper_read(x.data_ptr(), *weights, norm, out.data_ptr(), *written, is_bf16, *x.shape, iterations, rms_eps, eps)
    return out, post, comb


def written(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:  # [tokens, streams, width], [tokens, width], as `read` gave them
    """comb^T x + post y."""
    y, out = _like(x, y), torch.empty_like(x)
    addresses = x.data_ptr(), y.data_ptr(), post.data_ptr(), comb.data_ptr(), out.data_ptr()
    module().hyper_write(*addresses, x.dtype == torch.bfloat16, *x.shape)
    return out


def _like(x: Tensor, other: Tensor) -> Tensor:
    if other.dtype != x.dtype:
        raise ValueError(f"streams in {x.dtype} cannot be mixed with {other.dtype} {list(other.shape)}")
    return other.contiguous()

"""Manifold-constrained hyper-connections (mHC; Xie et al. 2026, in DeepSeek V4): several residual streams instead of one.

A block reads a weighted sum of the streams; what it says is added to each stream with a weight of its own, while the streams
themselves are mixed by a matrix C whose rows and columns sum to 1 (so that mixing never makes them grow):

    X <- post y^T + C^T X,   y = block(sum_i pre_i X_i)

All weights are functions of the streams X, token by token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvshare.kernels import streams as native
from kvshare.layers.latent_expansion import joined
from kvshare.layers.norm import RMSNorm


class Mixture(NamedTuple):
    """What one block reads of the streams, and how it will write to them."""

    normed: Tensor  # [tokens, hidden], the block's input
    post: Tensor  # [tokens, streams]
    comb: Tensor  # [tokens, streams, streams], doubly stochastic

    def expand(self, out: Tensor, streams: Tensor) -> Tensor:  # [tokens, hidden], [tokens, streams, hidden] -> [tokens, streams, hidden]
        """The streams behind the block whose output is `out`."""
        if native.takes(streams, self.post, self.comb) and out.dtype == streams.dtype:
            return native.written(streams, out, self.post, self.comb)
        precise = self.comb.dtype
        mixed = torch.matmul(self.comb.transpose(1, 2), streams.to(precise))
        return torch.addcmul(mixed, self.post[..., None], out.to(precise)[:, None]).to(streams.dtype)

    def at_rows(self, rows: Tensor) -> Mixture:
        """The same for some of the tokens."""
        return Mixture(self.normed[rows], self.post[rows], self.comb[rows])


class HyperConnection(nn.Module):
    """The weights around one block. `fn` gives, behind one another: n of `pre`, n of `post`, n * n of `comb`, row by row."""

    def __init__(self, hidden: int, streams: int, iterations: int, rms_eps: float, eps: float):
        super().__init__()
        self.streams, self.iterations, self.rms_eps, self.eps = streams, max(1, iterations), rms_eps, eps
        self.fn = nn.Parameter(torch.empty((2 + streams) * streams, streams * hidden))  # [2n + n^2, n * hidden]
        self.base = nn.Parameter(torch.empty((2 + streams) * streams))  # [2n + n^2]
        self.scale = nn.Parameter(torch.empty(3))  # of pre, post and comb

    def forward(self, x: Tensor, norm: RMSNorm) -> Mixture:  # [tokens, streams, hidden]
        """`norm` is for what the block reads."""
        if _is_taken(x, self.fn, self.base, self.scale):
            options = {"iterations": self.iterations, "rms_eps": self.rms_eps, "eps": self.eps}
            return Mixture(*native.read(x, self.fn, self.base, self.scale, norm.spelled(), **options))
        n = self.streams
        pre, post, comb = _projected(x, self.fn, self.rms_eps).split((n, n, n * n), dim=-1)
        pre_base, post_base, comb_base = self.base.split((n, n, n * n))
        post = 2 * torch.sigmoid(post * self.scale[1] + post_base)
        comb = (comb * self.scale[2] + comb_base).unflatten(-1, (n, n)).softmax(dim=-1) + self.eps
        collapsed = _weighted_sum(x, torch.sigmoid(pre * self.scale[0] + pre_base) + self.eps)
        return Mixture(norm(collapsed), post, sinkhorn(comb, self.iterations, self.eps))


class HyperHead(nn.Module):
    """The streams' weighted sum behind the last block."""

    def __init__(self, hidden: int, streams: int, rms_eps: float, eps: float):
        super().__init__()
        self.rms_eps, self.eps = rms_eps, eps
        self.fn = nn.Parameter(torch.empty(streams, streams * hidden))  # [streams, streams * hidden]
        self.base = nn.Parameter(torch.empty(streams))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:  # [tokens, streams, hidden] -> [tokens, hidden], normed
        if _is_taken(x, self.fn, self.base, self.scale):
            return native.read(x, self.fn, self.base, self.scale, norm.spelled(), iterations=0, rms_eps=self.rms_eps, eps=self.eps)[0]
        return norm(_weighted_sum(x, torch.sigmoid(_projected(x, self.fn, self.rms_eps) * self.scale + self.base) + self.eps))


def repeated(x: Tensor, streams: int) -> Tensor:  # [tokens, hidden] -> [tokens, streams, hidden]
    """The same in every stream."""
    return joined(*[x[:, None]] * streams).unflatten(2, (streams, -1))[:, 0] if streams > 1 else x[:, None]


def sinkhorn(x: Tensor, iterations: int, eps: float) -> Tensor:  # [..., n, n], positive, rows already summing to 1
    """Towards a doubly stochastic matrix (Sinkhorn and Knopp 1967): columns and rows are normalised in turn, columns first and last."""
    x = x / (x.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        x = x / (x.sum(dim=-1, keepdim=True) + eps)
        x = x / (x.sum(dim=-2, keepdim=True) + eps)
    return x


def _is_taken(x: Tensor, *weights: Tensor) -> bool:  # [tokens, streams, hidden]
    """Whether the kernel reads these streams: it reads the weights again for each token."""
    few = x.shape[0] <= native.FEW_ROWS
    return few and all(weight.dtype == torch.float32 for weight in weights) and native.takes(x, *weights)


def _projected(x: Tensor, fn: Tensor, eps: float) -> Tensor:  # [tokens, streams, hidden] -> [tokens, weights], at least float32
    """fn RMSNorm(all streams of a token as one vector); the norm is a scalar and so can follow the product."""
    flat = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    return F.linear(flat, fn.to(flat.dtype)) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def _weighted_sum(x: Tensor, weights: Tensor) -> Tensor:  # [tokens, streams, hidden], [tokens, streams] -> [tokens, hidden]
    return torch.matmul(weights[:, None], x.to(weights.dtype))[:, 0].to(x.dtype)

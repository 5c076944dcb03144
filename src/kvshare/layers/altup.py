"""Alternating updates (AltUp; Baykal et al. 2023), as Gemma 3n has them: several residual streams, of which a block works on the first.

All streams behind a layer are predicted, the layer runs on one, the others are corrected by what that one missed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvshare.kernels import small_ops
from kvshare.kernels import streams as native
from kvshare.layers.linear import Linear
from kvshare.layers.norm import RMSNorm


class AltUp(nn.Module):
    def __init__(self, hidden: int, streams: int, eps: float):
        super().__init__()
        self.streams, self.scale = streams, 1.0 / hidden
        self.router_norm = RMSNorm(hidden, eps)
        self.router = Linear(hidden, streams)
        self.prediction = Linear(streams, streams**2)
        self.correction = Linear(streams, streams)

    def predict(self, x: Tensor) -> Tensor:  # [tokens, streams, hidden]
        routed = self.router(self.router_norm(x[:, 0]))
        if native.takes(x, self.prediction.weight) and routed.dtype == x.dtype:
            return native.predicted(x, routed, self.prediction.weight, self.scale)
        mix = self.prediction(self._modalities(routed)).unflatten(-1, (self.streams, self.streams))  # [tokens, streams out, streams in]
        return x + mix @ x

    def correct(self, predicted: Tensor, active: Tensor, routed_by: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        """The streams [tokens, streams, hidden] behind a block that made `active` of the first, and the first times `gain` [hidden].

        `routed_by` is what `router_norm` makes of `active`; both [tokens, hidden].
        """
        routed = self.router(routed_by)
        if native.takes(predicted, self.correction.weight) and routed.dtype == active.dtype == predicted.dtype:
            return native.corrected(predicted, active, routed, self.correction.weight, gain, self.scale)
        missed = active - predicted[:, 0]
        gains = self.correction(self._modalities(routed)) + 1.0  # [tokens, streams]
        streams = predicted + missed[:, None] * gains[..., None]
        return streams, streams[:, 0] if gain is None else streams[:, 0] * gain

    def _modalities(self, routed: Tensor) -> Tensor:  # [tokens, streams]
        return torch.tanh((routed * self.scale).float()).to(routed.dtype)


def add_behind_first(x: Tensor, y: Tensor, norm: RMSNorm) -> Tensor:  # [tokens, streams, hidden], [tokens, hidden]
    """norm(y) on all streams but the first. The streams given may be changed."""
    if native.takes(x):
        return native.add_behind_first_(x, y, norm.spelled())
    return torch.cat([x[:, :1], x[:, 1:] + norm(y)[:, None]], dim=1)


def streams_of(first: Tensor, others: Sequence[Tensor]) -> Tensor:  # [tokens, hidden] each -> [tokens, streams, hidden]
    """The streams in front of the first block, all of the first one's magnitude."""
    if small_ops.takes(first):
        return native.at_magnitude(first, others, mean=False)
    return torch.stack([first, *(_at_magnitude_of(first, other) for other in others)], dim=1)


def mean_of(first: Tensor, others: Sequence[Tensor]) -> Tensor:  # [tokens, hidden] each
    """The mean of the streams behind the last block, all of the first one's magnitude."""
    if small_ops.takes(first):
        return native.at_magnitude(first, others, mean=True)
    return torch.stack([first, *(_at_magnitude_of(first, other) for other in others)], dim=1).mean(dim=1)


def _at_magnitude_of(target: Tensor, x: Tensor) -> Tensor:  # [tokens, hidden] each
    """`x` with the root mean square of `target`."""
    wanted = target.square().mean(-1, keepdim=True).sqrt()
    found = x.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
    return x * wanted / found

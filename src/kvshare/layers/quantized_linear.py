"""Linear layers whose weights stay in the quantized blocks of their file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.kernels.interleaved_blocks import InterleavedBlocks
from kvshare.kernels.quantized_weight import ActivationWidth, QuantizedWeight
from kvshare.kernels.small_ops import with_bias


class QuantizedLinear(nn.Module):
    """Stands in for `Linear`: y = x Wᵀ (+ b), with the projections that lie behind one another each in its own format.

    The blocks are no parameters, and no gradient reaches them.
    """

    def __init__(
        self,
        parts: Sequence[PackedBlocks | InterleavedBlocks | Tensor],
        bias: Tensor | None = None,  # [out_features]
        activations: ActivationWidth = "int16",
    ):
        super().__init__()
        self.weight = QuantizedWeight(parts, activations)
        self.out_features = self.weight.out_features
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        return self.part(x, 0, self.out_features)

    def part(self, x: Tensor, start: int, end: int) -> Tensor:  # [..., in_features] -> [..., end - start]
        """Only outputs `start:end`: one of the projections that lie together."""
        out = self.weight.matmul(x, start, end)
        return out if self.bias is None else with_bias(out, self.bias[start:end].to(out.dtype))

    def scores(self, hidden: Tensor) -> Tensor:  # [rows, in_features] -> [rows, out_features]
        """What it gives as a head: logits, in float32."""
        out = self.weight.matmul(hidden, dtype=torch.float32)
        return out if self.bias is None else with_bias(out, self.bias.float())

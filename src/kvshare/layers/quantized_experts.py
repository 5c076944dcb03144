"""Routed experts whose weights stay in quantized blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.kernels.interleaved_blocks import InterleavedBlocks
from kvshare.kernels.quantized_weight import ActivationWidth, QuantizedWeight
from kvshare.layers.activations import GatedActivation
from kvshare.layers.experts import RoutedExperts


class QuantizedExperts(RoutedExperts):
    """Stands in for `Experts`. Their matrices lie below one another, as one or as several parts, each in its own format.

    The blocks are no parameters, and no gradient reaches them.
    """

    def __init__(
        self,
        num_experts: int,
        gate_up: Sequence[PackedBlocks | InterleavedBlocks | Tensor],  # [experts * 2 * intermediate, hidden], an expert's gates first
        down: Sequence[PackedBlocks | InterleavedBlocks | Tensor],  # [experts * hidden, intermediate]
        activation: GatedActivation,
        activations: ActivationWidth = "int16",
    ):
        super().__init__(num_experts, activation)
        self.gate_up, self.down = QuantizedWeight(gate_up, activations), QuantizedWeight(down, activations)

    def few_rows_weights(self, x: Tensor) -> tuple[QuantizedWeight, QuantizedWeight] | None:  # [tokens, hidden]
        return self.gate_up, self.down

    def run_expert(self, expert: int, x: Tensor) -> Tensor:  # [tokens of this expert, hidden] -> the same
        gate, up = _of(self.gate_up, expert, self.num_experts, x).chunk(2, dim=-1)
        return _of(self.down, expert, self.num_experts, self.activation(gate, up))


def _of(weight: QuantizedWeight, expert: int, num_experts: int, x: Tensor) -> Tensor:  # [tokens, in_features] -> [tokens, rows]
    """The product with one expert's rows."""
    rows = weight.out_features // num_experts
    return weight.matmul(x, expert * rows, (expert + 1) * rows)

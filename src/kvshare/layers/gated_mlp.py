"""The gated feed-forward layer: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor, nn

from kvshare.layers.activations import GatedActivation
from kvshare.layers.linear import Linear


class GatedMlp(nn.Module):
    """Gate and up lie behind one another in one weight: one product computes both."""

    def __init__(self, hidden: int, intermediate: int, activation: GatedActivation, bias: bool = False):
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(hidden, 2 * intermediate, bias)
        self.down = Linear(intermediate, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:  # [tokens, hidden]
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate, up))

"""What stands between the two products of a gated feed-forward layer (Shazeer 2020): activation(gate) * up."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from kvshare.kernels import small_ops

GatedActivation = Callable[[Tensor, Tensor], Tensor]
"""gate and up [..., intermediate] -> [..., intermediate]."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if small_ops.takes_gates(gate, up):
        return small_ops.gated(gate, up, gelu=False)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """With the tanh form of GELU, as every Gemma has it."""
    if small_ops.takes_gates(gate, up):
        return small_ops.gated(gate, up, gelu=True)
    return F.gelu(gate, approximate="tanh") * up

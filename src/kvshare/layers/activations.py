"""What stands between the two products of a gated feed-forward layer (Shazeer 2020): activation(gate) * up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvshare.kernels import small_ops


@dataclass(frozen=True, slots=True)
class GatedActivation:
    """SiLU, or GELU in its tanh form as every Gemma has it."""

    gelu: bool = False
    limit: float = float("inf")  # of gates, which are cut above, and of what they gate, on both sides (DeepSeek V4; SiLU only)
    deviations: float = -float(
        "inf"
    )  # gates lose their mean plus so many standard deviations, and what is then negative (Gemma 3n; GELU only)

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:  # [..., intermediate] each
        if small_ops.takes_gates(gate, up):
            return small_ops.gated(gate, up, self.spelled())
        if self.limit < float("inf"):
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.deviations > -float("inf"):
            deviation, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
            factor = torch.tensor(self.deviations, dtype=gate.dtype)  # rounded as in training
            gate = F.relu(gate - (mean + deviation * factor))
        return (F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)) * up

    def spelled(self) -> small_ops.Activation:
        """What the kernels are told."""
        return self.gelu, self.limit, self.deviations


def gelu(x: Tensor) -> Tensor:  # [rows, width]
    """GELU in its own form, with the error function."""
    return small_ops.channels(x, gelu=True) if small_ops.takes(x) else F.gelu(x)


swiglu, geglu = GatedActivation(), GatedActivation(gelu=True)

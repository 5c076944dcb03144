"""Routed experts: each token runs through a few of many gated feed-forward layers (Shazeer et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvshare.checkpoints.source import Source
from kvshare.kernels import experts as few_experts
from kvshare.kernels.quantized_weight import QuantizedWeight
from kvshare.layers.activations import GatedActivation
from kvshare.layers.few_rows import FewRowsProduct


class RoutedExperts(nn.Module):
    """All experts of one layer. Tokens are sorted by expert, so that each expert is one product over all its tokens.

    A token's experts are summed in the order in which its router names them, whatever else is in the batch.
    """

    def __init__(self, num_experts: int, activation: GatedActivation):
        super().__init__()
        self.num_experts, self.activation = num_experts, activation

    def few_rows_weights(self, x: Tensor) -> tuple[QuantizedWeight, QuantizedWeight] | None:  # [tokens, hidden]
        """What one native call multiplies these few rows with: all gates and ups, and all downs. None where there is no such call."""
        raise NotImplementedError

    def run_expert(self, expert: int, x: Tensor) -> Tensor:  # [tokens of this expert, hidden] -> the same
        """One expert's feed-forward layer."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,  # [tokens, hidden]
        chosen: Tensor,  # [tokens, k] int64; `num_experts` stands for no expert at all, which adds nothing
        weights: Tensor,  # [tokens, k], on the experts' outputs
        *,
        scale: float = 1.0,
        beside: Tensor | None = None,  # [tokens, hidden]
    ) -> Tensor:  # [tokens, hidden]
        """The weighted sum of each token's experts, times `scale`, plus what a layer beside them says."""
        few = self.few_rows_weights(x) if few_experts.takes(x) else None
        if few is not None:
            return few_experts.run(*few, x, chosen, weights, self.num_experts, self.activation.spelled(), scale, beside)
        routed = self._sum(x, chosen, weights)
        if scale != 1.0:
            routed = routed * scale
        return routed if beside is None else routed + beside

    def _sum(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, k = chosen.shape
        if not tokens:
            return x
        assigned = chosen.flatten()
        order = assigned.argsort(stable=True)  # places in `assigned`, expert by expert
        counts = torch.bincount(assigned, minlength=self.num_experts + 1).tolist()
        rows = x[order // k].split(counts)
        outs = [
            self.run_expert(expert, part) if expert < self.num_experts else torch.zeros_like(part)
            for expert, part in enumerate(rows)
            if len(part)
        ]
        by_place = torch.cat(outs)[order.argsort()].unflatten(0, (tokens, k))  # [tokens, k, hidden]
        precise = torch.promote_types(x.dtype, torch.float32)
        return (by_place.to(precise) * weights.to(precise)[..., None]).sum(1).to(x.dtype)


class Experts(RoutedExperts):
    """Plain weights, stacked."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int, activation: GatedActivation):
        super().__init__(num_experts, activation)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * intermediate, hidden))  # [experts, 2 * intermediate, hidden], gate first
        self.down = nn.Parameter(torch.empty(num_experts, hidden, intermediate))  # [experts, hidden, intermediate]
        self._few_gate_up, self._few_down = FewRowsProduct(), FewRowsProduct()

    def few_rows_weights(self, x: Tensor) -> tuple[QuantizedWeight, QuantizedWeight] | None:  # [tokens, hidden]
        gate_up = self._few_gate_up.of(self.gate_up.flatten(0, 1), x, few_experts.MOST_ROWS)
        down = self._few_down.of(self.down.flatten(0, 1), x, few_experts.MOST_ROWS)
        return None if gate_up is None or down is None else (gate_up, down)

    def run_expert(self, expert: int, x: Tensor) -> Tensor:  # [tokens of this expert, hidden] -> the same
        gate, up = F.linear(x, self.gate_up[expert]).chunk(2, dim=-1)
        return F.linear(self.activation(gate, up), self.down[expert])


def expert_sources(prefix: str, num_experts: int) -> dict[str, Source]:
    """Where the parameters of `Experts` come from: released checkpoints name each expert, transformers' own modules stack them."""
    each = [f"{prefix}.{expert}" for expert in range(num_experts)]
    gate_up = tuple(f"{expert}.{half}_proj.weight" for expert in each for half in ("gate", "up"))
    down = tuple(f"{expert}.down_proj.weight" for expert in each)
    return {
        "gate_up": Source(gate_up, otherwise=Source((f"{prefix}.gate_up_proj",)), stack=num_experts),
        "down": Source(down, otherwise=Source((f"{prefix}.down_proj",)), stack=num_experts),
    }

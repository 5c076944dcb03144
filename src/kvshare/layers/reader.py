"""What a layer that reads another layer's cache may add: linear maps between its owner's heads and its own.

An owner's keys and values were made for the owner. For each key-value head g a reader may see them through two maps of its own:

    score(t, j) = (A_k[g] q_t) . k_j              q_t rotated, k_j as it lies in the cache
    output(t)   = W_o (A_v[g] sum_j p(t, j) v_j)  = (W_o A_v[g]) sum_j p(t, j) v_j

The cache does not change, so any number of readers can have maps of their own. A_k costs one small product for each query; A_v costs
nothing, because it is multiplied into the output projection when the weights are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvshare.checkpoints.source import Source


class KeyProjection(nn.Module):
    """A_k, on the rotated queries of each key-value head's group."""

    def __init__(self, kv_heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kv_heads, width, width))  # [kv_heads, owner's width, reader's width]

    def forward(self, q: Tensor) -> Tensor:  # [tokens, heads, width]
        grouped = q.unflatten(1, (len(self.weight), -1))  # [tokens, kv_heads, group, width]
        return torch.einsum("tgqd,ged->tgqe", grouped, self.weight).flatten(1, 2)


def with_value_projection(output: Source, layer: int) -> Source:
    """Where the output projection of a reader comes from, with A_v multiplied into it. A_v has the shape of A_k."""
    return Source((*output.names, f"model.layers.{layer}.self_attn.shared_v_proj.weight"), _folded)


def _folded(parts: list[Tensor]) -> Tensor:  # W_o [hidden, heads * width], A_v [kv_heads, width, width] -> W_o A_v
    output, projection = parts
    precise = torch.promote_types(output.dtype, torch.float32)
    grouped = output.to(precise).unflatten(1, (len(projection), -1, projection.shape[1]))  # [hidden, kv_heads, group, width]
    return torch.einsum("ogqe,ged->ogqd", grouped, projection.to(precise)).flatten(1).to(output.dtype)

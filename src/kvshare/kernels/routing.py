"""Which experts a token runs through and with what weights, in one native call behind the product that scores them.

The twins in plain torch are the routers of the models. Weights differ by at most 2^-20 of themselves before they are rounded; of equal
scores the earlier expert is chosen.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvshare.kernels import small_ops
from kvshare.kernels.native import module

_MOST_EXPERTS = 1024


def takes(scores: Tensor) -> bool:  # [tokens, experts]
    """Whether `route` takes these scores."""
    return scores.dim() == 2 and scores.shape[1] <= _MOST_EXPERTS and small_ops.takes(scores) and scores.is_contiguous()


def route(
    scores: Tensor,  # [tokens, experts], in bfloat16 or float32
    k: int,
    scoring: Literal["softmax", "sigmoid", "sqrt_softplus"],
    dtype: torch.dtype,  # of the weights: bfloat16 or float32
    *,
    softcap: float = 0.0,  # on the scores
    bias: Tensor | None = None,  # [experts], for the choice alone
    groups: tuple[int, int] = (1, 1),  # how many the experts lie in, and from how many of these, the best, they are chosen
    lookup: tuple[Tensor, Tensor] | None = None,  # a table [ids, k] int64 and ids [tokens] int64, instead of a choice
    tiny: float | None = 0.0,  # added to the sum of a token's weights, which they are divided by; None: they are not
    scale: float = 1.0,
    expert_scale: Tensor | None = None,  # [experts]
) -> tuple[Tensor, Tensor]:  # chosen int64 and weights, [tokens, k] each
    """The best `k` experts of each token, best first, and `scale * score / (sum of its scores + tiny) * expert_scale`."""
    rows, experts = scores.shape
    chosen, weights = torch.empty(rows, k, dtype=torch.long), torch.empty(rows, k, dtype=dtype)
    bias = None if bias is None else bias.float()
    bias_at = _address(bias, torch.float32)
    table, ids = (0, 0) if lookup is None else (_address(lookup[0], torch.int64), _address(lookup[1], torch.int64))
    if experts % groups[0] or (lookup is None and k > experts // groups[0] * groups[1]) or (lookup is not None and lookup[0].shape[1] != k):
        raise ValueError(f"{k} experts cannot be chosen from {groups[1]} of {groups[0]} groups of {experts}")
    scale_bf16 = expert_scale is not None and expert_scale.dtype == torch.bfloat16
    scale_at = _address(expert_scale, torch.bfloat16 if scale_bf16 else torch.float32)
    kind, bf16 = module().Scoring[scoring.upper()], torch.bfloat16
    choice = k, kind, softcap, bias_at, *groups, table, ids, -1.0 if tiny is None else tiny, scale, scale_at, scale_bf16
    module().route(scores.data_ptr(), scores.dtype == bf16, rows, experts, *choice, chosen.data_ptr(), weights.data_ptr(), dtype == bf16)
    return chosen, weights


def _address(tensor: Tensor | None, dtype: torch.dtype) -> int:
    if tensor is None:
        return 0
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"a router takes {dtype} numbers in one piece, not {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()

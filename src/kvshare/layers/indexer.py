"""The lightning indexer of DeepSeek V3.2 and V4: small heads score every key, and a query attends only to the best `top_k` rows.

    score(t, s) = sum_h w_h(t) * relu(q_h(t) . k(s)) / sqrt(width)

Scores are exactly 0 wherever no head agrees, so ties are common. They are broken by place, the earlier row first, which
makes the choice independent of how many rows stand beside them: the same in one shot, in chunks and stepwise.

This is the choice in plain torch (`Step.select`), and the twin of `kvshare.kernels.row_selection`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SCORE_LIMIT = 1 << 24  # most scores of single heads (numbers) that exist at once


def select_rows(
    q: Tensor,  # [tokens, index heads, width]
    weights: Tensor,  # [tokens, index heads]
    keys: Tensor,  # [rows, width]
    visible: Tensor,  # [tokens], how many of the first rows each token sees
    top_k: int,
) -> Tensor:  # int64 [tokens, top_k]
    """The rows that each token attends to: `best_rows` of `index_scores`, a slice of the tokens at a time."""
    keys = keys.to(torch.promote_types(q.dtype, torch.float32))
    size = max(1, _SCORE_LIMIT // max(1, len(keys) * q.shape[1]))
    chosen = []
    for start in range(0, len(q), size):
        part = slice(start, start + size)
        chosen.append(best_rows(index_scores(q[part], weights[part], keys), visible[part], top_k))
    return torch.cat(chosen) if chosen else visible.new_empty(0, top_k)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Scores [tokens, rows] from q [tokens, heads, width], weights [tokens, heads] and keys [rows, width]."""
    heads = torch.matmul(q.to(keys.dtype), keys.T).relu_()  # [tokens, heads, rows]
    return torch.matmul(weights.to(keys.dtype)[:, None], heads)[:, 0]


def best_rows(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:  # [tokens, rows], [tokens] -> [tokens, top_k]
    """The `top_k` rows of highest score among the first `visible` ones, ascending; of equal scores the earlier row. -1 behind the last."""
    rows = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.float() + 0.0  # -0.0 becomes 0.0: they are equal, and must be equal as bits
    scores = scores.masked_fill(rows >= visible[:, None], -torch.inf)
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    unique = (ordered << 32) - rows  # no two are equal: an earlier row is larger
    best = unique.topk(min(top_k, len(rows)), dim=1).indices.sort(dim=1).values
    best = torch.where(best < visible[:, None], best, -1)  # the rows seen come first, and are chosen before all others
    return F.pad(best, (0, top_k - best.shape[1]), value=-1)

"""The lightning indexer of DeepSeek V3.2 and V4: small heads score every key, and a query attends only to the best `top_k` rows.

    score(t, s) = sum_h w_h(t) * relu(q_h(t) . k(s)) / sqrt(width)

Scores are exactly 0 wherever no head agrees, so ties are common. They are broken by place, the earlier row first, which
makes the choice independent of how many rows stand beside them: the same in one shot, in chunks and stepwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvshare.cache.step import Step

_SCORE_LIMIT = 1 << 24  # most scores of single heads (numbers) that exist at once


@torch.no_grad()  # a choice has no gradient
def select_rows(step: Step, layer: int, q: Tensor, weights: Tensor, top_k: int, tokens_per_row: int) -> Tensor | None:
    """The rows that each query of the step attends to: int64 [tokens, top_k], -1 for none; None if no query sees more than `top_k`.

    `q` [tokens, index heads, width], `weights` [tokens, index heads] (with 1 / sqrt(width) and the heads' own scale in them).
    Keys are the layer's stream "index", where this step's are already appended.
    """
    if all((span.last + 1) // tokens_per_row <= top_k for span in step.spans):
        return None
    chosen = []
    for sequence, span in enumerate(step.spans):
        keys = step.rows(layer, "index", sequence)[:, 0].to(torch.promote_types(q.dtype, torch.float32))  # [rows, width]
        visible = (step.positions[span.start : span.end] + 1) // tokens_per_row
        size = max(1, _SCORE_LIMIT // max(1, len(keys) * q.shape[1]))
        for start in range(span.start, span.end, size):
            part = slice(start, min(start + size, span.end))
            scores = index_scores(q[part], weights[part], keys)
            chosen.append(best_rows(scores, visible[start - span.start : part.stop - span.start], top_k))
    return torch.cat(chosen)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Scores [tokens, rows] from q [tokens, heads, width], weights [tokens, heads] and keys [rows, width]."""
    heads = torch.matmul(q.to(keys.dtype), keys.T).relu_()  # [tokens, heads, rows]
    return torch.matmul(weights.to(keys.dtype)[:, None], heads)[:, 0]


def best_rows(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:  # [tokens, rows], [tokens] -> [tokens, top_k]
    """The `top_k` rows of highest score among the first `visible` ones; of equal scores the earlier row. -1 where there are no more."""
    rows = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.float() + 0.0  # -0.0 becomes 0.0: they are equal, and must be equal as bits
    scores = scores.masked_fill(rows >= visible[:, None], -torch.inf)
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    unique = (ordered << 32) - rows  # no two are equal: an earlier row is larger
    best = unique.topk(min(top_k, len(rows)), dim=1).indices
    best = torch.where(best < visible[:, None], best, -1)
    return F.pad(best, (0, top_k - best.shape[1]), value=-1)

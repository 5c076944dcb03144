"""Attention of a few queries over rows of keys and values, in plain torch: the reference that native kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SCORE_LIMIT = 1 << 24  # most scores (numbers) that the explicit path keeps at once


def attention(
    q: Tensor,  # [tokens, query_heads, key_width]
    k: Tensor,  # [rows, kv_heads, key_width]
    v: Tensor,  # [rows, kv_heads, value_width]
    mask: Tensor | None,  # [tokens, rows], 0 or -inf, in q's dtype; None: every query sees every row
    *,
    causal: bool = False,  # tokens and rows are the same positions, and nothing else hides a row
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [query_heads], a logit that takes part in the softmax and carries no value
) -> Tensor:  # [tokens, query_heads, value_width]
    """Grouped-query attention. Query heads of one KV head are kept together, so that keys and values are never repeated in memory."""
    tokens, query_heads, key_width = q.shape
    kv_heads = k.shape[1]
    group = query_heads // kv_heads
    if softcap is not None or sinks is not None or k.shape[-1] != v.shape[-1]:
        return _explicit_attention(q, k, v, mask, causal, scale, softcap, sinks)
    keys, values = k.transpose(0, 1).to(q.dtype), v.transpose(0, 1).to(q.dtype)  # [kv_heads, rows, width]; cached in another type, maybe
    if tokens == 1:  # the group's heads are queries of one head: keys are read once for all of them
        queries = q.view(1, kv_heads, group, key_width)
        out = F.scaled_dot_product_attention(queries, keys[None], values[None], attn_mask=mask, scale=scale)
        return out.view(1, query_heads, -1)
    queries = q.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)  # [kv_heads, group, tokens, width]
    shape = (kv_heads, group, k.shape[0], key_width)
    out = F.scaled_dot_product_attention(
        queries, keys[:, None].expand(shape), values[:, None].expand(shape), attn_mask=mask, is_causal=causal, scale=scale
    )
    return out.permute(2, 0, 1, 3).reshape(tokens, query_heads, -1)


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Scores, softmax and sum written out, for what torch's fused attention cannot do; a slice of the queries at a time."""
    tokens, query_heads, _ = q.shape
    rows, kv_heads = k.shape[0], k.shape[1]
    if causal:
        mask = torch.full((tokens, rows), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    precise = torch.promote_types(q.dtype, torch.float32)
    keys = k.permute(1, 2, 0).to(precise)  # [kv_heads, width, rows]
    values = v.transpose(0, 1).to(precise)
    grouped = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).to(precise)  # [kv_heads, tokens, group, width]
    outs = []
    step = max(1, _SCORE_LIMIT // (rows * query_heads))
    for start in range(0, tokens, step):
        queries = grouped[:, start : start + step]
        scores = torch.matmul(queries.flatten(1, 2), keys).unflatten(1, queries.shape[1:3]) * scale  # [kv_heads, tokens, group, rows]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + mask[start : start + step, None]
        if sinks is not None:
            column = sinks.to(precise).view(kv_heads, 1, -1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(dim=-1)[..., :rows]
        outs.append(torch.matmul(weights.flatten(1, 2), values).unflatten(1, queries.shape[1:3]))
    out = torch.cat(outs, dim=1)  # [kv_heads, tokens, group, width]
    return out.transpose(0, 1).reshape(tokens, query_heads, -1).to(q.dtype)

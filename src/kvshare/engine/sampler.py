"""Choosing the next token from logits, one row at a time; of a large vocabulary only tokens of about the same probability are sorted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kvshare.engine.outputs import Logprob, TokenLogprobs
from kvshare.engine.sampling import SamplingParams
from kvshare.kernels.edges import argmax

_BUCKET_BITS = 16  # of a float32, behind those that tell buckets apart
_FEW = 1024  # tokens are sorted at once
_BLOCK = 512  # tokens whose probabilities are summed first


def sample(
    logits: Tensor,  # [vocab], float32; changed in place where penalties apply
    params: SamplingParams,
    generator: torch.Generator,
    prompt: Sequence[int],
    output: Sequence[int],
) -> int:
    """The next token: penalties, then greedy or temperature, top-k, min-p and top-p in the order that Hugging Face and vLLM apply them."""
    _penalise(logits, params, prompt, output)
    if params.greedy:
        return argmax(logits)
    candidates = None  # token ids, most probable first; None: all tokens in order
    if 0 < params.top_k < logits.numel():
        logits, candidates = logits.topk(params.top_k)
    probabilities = torch.softmax(logits / params.temperature, dim=0, dtype=torch.float32)
    if params.min_p > 0:
        probabilities = torch.where(probabilities >= params.min_p * probabilities.max(), probabilities, 0)
    if params.top_p < 1:
        probabilities = _nucleus(probabilities / probabilities.sum(), params.top_p)
    return _draw(probabilities, candidates, generator)


def _penalise(logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> None:
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *output}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts


def _nucleus(probabilities: Tensor, mass: float) -> Tensor:
    """Zero for all but the fewest most probable tokens that together reach `mass` (Holtzman et al. 2020); of equal ones the first.

    Tokens are counted in buckets by the leading bits of their probability, and only those of the bucket in which `mass` is reached sorted.
    """
    bits = _BUCKET_BITS if probabilities.numel() > _FEW else 31  # few are one bucket
    buckets = probabilities.view(torch.int32) >> bits  # floats that are not negative are in the order of their bits
    masses = torch.bincount(buckets, weights=probabilities.double())
    above = masses.flip(0).cumsum(0).flip(0) - masses  # mass of the buckets above each
    border = int((above >= mass).sum())
    inside = (buckets == border).nonzero()[:, 0]
    values, order = probabilities[inside].sort(descending=True, stable=True)
    reached = int((above[border] + values.double().cumsum(0) < mass).sum()) + 1
    kept = torch.where(buckets > border, probabilities, 0)
    kept[inside[order[:reached]]] = values[:reached]
    return kept


def _draw(probabilities: Tensor, candidates: Tensor | None, generator: torch.Generator) -> int:
    """One token with these (unnormalised) probabilities, by inverting their cumulative sum: its block first, then its place there."""
    blocks = F.pad(probabilities, (0, -probabilities.numel() % _BLOCK)).view(-1, _BLOCK)
    cumulative = blocks.sum(1, dtype=torch.float64).cumsum(0)  # [blocks]
    place = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    last = torch.searchsorted(cumulative, cumulative[-1:])[0]  # behind it nothing is probable
    block = int(torch.searchsorted(cumulative, place, right=True).clamp(max=last.clamp(max=len(blocks) - 1)))
    inside = blocks[block].double().cumsum(0) + (cumulative[block - 1] if block else 0.0)
    furthest = int(blocks[block].nonzero()[-1])  # two ways to sum may differ in the last bits
    index = block * _BLOCK + min(int(torch.searchsorted(inside, place, right=True)), furthest)
    return index if candidates is None else int(candidates[index])


def logprobs_of(logits: Tensor, tokens: Tensor, count: int) -> list[TokenLogprobs]:
    """For each row, the given token's log-probability and those of the `count` most probable: logits [rows, vocab], tokens [rows]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])  # [rows, 1]
    ranks = (logprobs > chosen).sum(1) + 1
    values, ids = logprobs.topk(count, dim=1) if count else (logprobs[:, :0], tokens[:, None][:, :0])
    rows = []
    for row, (token, logprob, rank) in enumerate(zip(tokens.tolist(), chosen[:, 0].tolist(), ranks.tolist(), strict=True)):
        entry = {token: Logprob(logprob, rank)}
        for place, (other, value) in enumerate(zip(ids[row].tolist(), values[row].tolist(), strict=True)):
            entry.setdefault(other, Logprob(value, place + 1))
        rows.append(entry)
    return rows

"""Choosing the next token from logits, one row at a time, without ever sorting the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvshare.engine.outputs import Logprob, TokenLogprobs
from kvshare.engine.sampling import SamplingParams

_FIRST_CANDIDATES = 1024  # a nucleus is nearly always inside the most probable thousand


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
        return int(logits.argmax())
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
    """Zero for all but the fewest most probable tokens that together reach `mass` (Holtzman et al. 2020)."""
    count = min(_FIRST_CANDIDATES, probabilities.numel())
    top, places = probabilities.topk(count)
    reached = int((top.cumsum(0) < mass).sum()) + 1
    if reached > count and count < probabilities.numel():
        return torch.where(probabilities >= _threshold(probabilities, mass), probabilities, 0)
    kept = torch.zeros_like(probabilities)
    kept[places[:reached]] = top[:reached]
    return kept


def _threshold(probabilities: Tensor, mass: float) -> float:
    """The largest t for which the tokens of probability t or more reach `mass`, by bisection, for flat distributions."""
    low, high = 0.0, float(probabilities.max())
    for _ in range(50):
        middle = (low + high) / 2
        if float(probabilities[probabilities >= middle].sum()) >= mass:
            low = middle
        else:
            high = middle
    return low


def _draw(probabilities: Tensor, candidates: Tensor | None, generator: torch.Generator) -> int:
    """One token with these (unnormalised) probabilities, by inverting their cumulative sum."""
    cumulative = probabilities.double().cumsum(0)
    place = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, place, right=True).clamp(max=probabilities.numel() - 1))
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

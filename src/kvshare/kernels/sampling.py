"""Choosing a token from logits, and how probable it was. Nothing is sorted but what may be kept.

A token's weight is the integer nearest to 2^40 exp((logit - largest) / temperature). Integers add up to the same in any order, so that a
token depends on the logits and on its random number alone: not on threads, on the instruction set, or on whether there are kernels. Where
the exponential is computed, products are rounded before they are added to, here as there, which makes the weights the same to the bit.
What weighs below half a unit is never drawn: 2^18 such tokens together would be drawn once in 8 million times.

Tokens are in the order of their logits, of equal ones the first in front; a NaN is as large as infinity.
"""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from kvshare.kernels.native import available, module

ONE = 1 << 40  # what the largest logit weighs
_POWER = (0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0)
_LARGEST_FLOAT = torch.finfo(torch.float32).max


class Leading(NamedTuple):
    """Of a softmax: a token's rank, 1 where no logit is larger, and the tokens with the largest logits, best first."""

    log_sum: float  # of the exponentials of all logits, the largest being zero
    largest: float
    rank: int
    tokens: list[int]
    logits: list[float]  # theirs


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, place: float) -> int:  # float32 [vocab]
    """The token at `place`, in [0, 1), of what top-k (0: all), then min-p, then top-p leave (Holtzman et al. 2020).

    Tokens lie beside one another in the order of the vocabulary, each as wide as its probability. One is always left.
    """
    inverse = min(math.log2(math.e) / temperature, _LARGEST_FLOAT)
    least = math.ceil(min_p * ONE)
    if _takes(logits):
        return module().draw(logits.data_ptr(), logits.numel(), inverse, top_k, least, top_p, place)
    x = _ordered(logits)
    weights = _weights(x, inverse)
    if 0 < top_k < len(x):
        weights = torch.where(_largest(x, top_k), weights, 0)
    weights = torch.where(weights >= least, weights, 0)
    if top_p < 1:
        weights = _nucleus(x, weights, top_p)
    cumulative = weights.cumsum(0)
    everything = int(cumulative[-1])
    return int(torch.searchsorted(cumulative, min(int(place * everything), everything - 1), right=True))


def leading(logits: Tensor, token: int, count: int) -> Leading:  # float32 [vocab]
    """What the log-probabilities of `token` and of the `count` most probable tokens are made of."""
    if _takes(logits):
        largest, weight, rank, tokens, theirs = module().leading(logits.data_ptr(), logits.numel(), token, count)
        return Leading(math.log(weight / ONE), largest, rank, tokens, theirs)
    x = _ordered(logits)
    weight = int(_weights(x, math.log2(math.e)).sum())
    best = _largest(x, min(count, len(x))).nonzero()[:, 0] if count else torch.empty(0, dtype=torch.long)
    best = best[x[best].argsort(descending=True, stable=True)]
    rank = 1 + int((x > logits[token]).sum())
    return Leading(math.log(weight / ONE), float(x.max()), rank, best.tolist(), logits[best].tolist())


def penalise(
    logits: Tensor,  # float32 [vocab]; changed in place
    tokens: array[int],  # different ones, of 8 bytes each
    times: array[int],  # that each occurred in the output; 0 for those of the prompt alone
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Divide positive logits of `tokens` by `repetition` and multiply others (Keskar et al. 2019); subtract from those in the output."""
    if _takes(logits):
        where = tokens.buffer_info()[0], times.buffer_info()[0], len(tokens)
        module().penalise(logits.data_ptr(), logits.numel(), *where, repetition, presence, frequency)
        return
    seen, counts = (torch.tensor(numbers, dtype=torch.long, device=logits.device) for numbers in (tokens, times))
    values = logits[seen]
    if repetition != 1:
        values = torch.where(values > 0, values / repetition, values * repetition)
    logits[seen] = torch.where(counts > 0, values - (presence + frequency * counts), values)


def _takes(logits: Tensor) -> bool:
    return available() and logits.is_cpu and logits.dtype == torch.float32 and logits.is_contiguous()


def _ordered(logits: Tensor) -> Tensor:
    return logits.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _weights(x: Tensor, inverse: float) -> Tensor:  # float32 [vocab] -> int64 [vocab]
    """2^40 * 2^((x - max(x)) * inverse), to the nearest integer."""
    most = x.max()
    t = (torch.where(x == most, 0, x - most) * inverse).clamp(min=-64)
    whole = t.round()
    r = t - whole  # in -1/2 ... 1/2, where the polynomial is off by 2e-7
    power = torch.full_like(r, _POWER[0])
    for coefficient in _POWER[1:]:
        power = power * r + coefficient
    return (power * ((whole.int() + 127 + 40) << 23).view(torch.float32)).double().round().long()


def _largest(x: Tensor, count: int) -> Tensor:  # float32 [vocab] -> bool [vocab]
    """Which tokens are the `count` first."""
    border = x.topk(count).values[-1]
    kept, equal = x > border, (x == border).nonzero()[:, 0]
    kept[equal[: count - int(kept.sum())]] = True
    return kept


def _nucleus(x: Tensor, weights: Tensor, mass: float) -> Tensor:  # float32 [vocab], int64 [vocab] -> int64 [vocab]
    """Zero for all but the first tokens that together reach `mass` of the sum."""
    everything = int(weights.sum())
    wanted = min(max(math.ceil(mass * everything), 1), everything)
    least = x[weights > (everything - wanted) // len(x)].min()  # all tokens below would not be missed
    likely = (x >= least).nonzero()[:, 0]
    order = likely[x[likely].argsort(descending=True, stable=True)]
    reached = int((weights[order].cumsum(0) < wanted).sum()) + 1
    kept = torch.zeros_like(weights)
    kept[order[:reached]] = weights[order[:reached]]
    return kept

"""Drawing a token is the same on every instruction set and in plain torch, to the token, and what definitions by sorting say."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvshare import kernels
from kvshare.kernels import sampling
from kvshare.kernels.native import ISAS
from kvshare.kernels.sampling import draw, leading, penalise

How = tuple[float, int, float, float]
"""temperature, top_k, top_p, min_p"""


def everywhere() -> list[str]:
    """The instruction sets of this processor, and torch."""
    found = ["torch"]
    for name in ISAS:
        with kernels.use_isa(name) as has:
            found += [name] * has
    return found


SETS = everywhere()


def on(name: str, run: object, *arguments: object) -> object:
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        assert callable(run)
        if name != "torch":
            with kernels.use_isa(name):
                return run(*arguments)
        patch.setattr(sampling, "available", lambda: False)
        return run(*arguments)


def kept_by_sorting(logits: Tensor, how: How) -> dict[int, float]:
    """Tokens that may be drawn, with their probabilities, in doubles."""
    temperature, top_k, top_p, min_p = how
    x = logits.double().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    order = x.argsort(descending=True, stable=True)[: top_k or None]
    most = x.max()
    weights = (torch.where(x == most, 0, x - most) / temperature).exp()[order]
    order, weights = order[weights >= min_p], weights[weights >= min_p]
    if top_p < 1:
        reached = int((weights.cumsum(0) < top_p * weights.sum()).sum()) + 1
        order, weights = order[:reached], weights[:reached]
    probabilities = weights / weights.sum()
    return dict(zip(order.tolist(), probabilities.tolist(), strict=True))


LOGITS = st.lists(
    st.one_of(st.floats(-30, 30, width=32), st.sampled_from([-math.inf, 0.0, -0.0, 1.0, 1.0000001, -1e30, 1e30, math.inf, math.nan])),
    min_size=1,
    max_size=300,
)
TEMPERATURES = st.sampled_from([5e-324, 1e-30, 1e-3, 0.3, 0.8, 1.0, 2.0, 100.0])
HOWS = st.tuples(
    TEMPERATURES, st.sampled_from([0, 1, 2, 5, 40, 1000]), st.sampled_from([1e-9, 0.1, 0.5, 0.95, 1.0]), st.sampled_from([0.0, 0.05, 1.0])
)
PLACES = st.floats(0, 1, exclude_max=True)


@settings(max_examples=150, deadline=None)
@given(LOGITS, HOWS, PLACES)
def test_the_token_is_one_that_may_be_drawn_and_the_same_everywhere(numbers: list[float], how: How, place: float) -> None:
    logits = torch.tensor(numbers)
    tokens = {on(name, draw, logits, *how, place) for name in SETS}
    assert len(tokens) == 1, tokens
    (token,) = tokens
    assert isinstance(token, int)
    temperature, top_k, top_p, min_p = how
    looser = temperature, top_k, min(1.0, top_p + 2e-6), min_p * (1 - 1e-5)  # weights have 2^-22 of themselves as their error
    assert kept_by_sorting(logits, looser)[token] >= 0


def large(spread: float, size: int = 50_000) -> Tensor:
    """Logits of which blocks, shares of blocks and ties are all met."""
    logits = spread * torch.randn(size, generator=torch.Generator().manual_seed(int(spread * 10)))
    logits[::3] = logits[::3].to(torch.bfloat16).float()
    logits[100:400] = -torch.inf
    return logits


LARGE = [
    (0.8, 0, 1.0, 0.0),
    (0.8, 0, 0.95, 0.0),
    (0.8, 40, 1.0, 0.0),
    (1.0, 600, 0.9, 0.0),
    (1.0, 0, 0.9, 0.02),
    (1.0, 0, 1.0, 1e-6),
    (30.0, 0, 0.6, 0.0),
]


@pytest.mark.parametrize("how", LARGE)
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
def test_large_vocabularies(spread: float, how: How) -> None:
    """Where few tokens suffice and where most are needed: the same everywhere on any number of threads, and what sorting gives."""
    logits, threads = large(spread), torch.get_num_threads()
    expected = kept_by_sorting(logits, how)
    for place in (0.0, 0.2, 0.77, 1 - 2**-53):
        tokens = set()
        for name in SETS:
            for count in (1, 3):
                torch.set_num_threads(count)
                tokens.add(on(name, draw, logits, *how, place))
        torch.set_num_threads(threads)
        assert len(tokens) == 1, tokens
        assert tokens <= expected.keys()
    drawn = draw(logits, *how, 0.4)
    end = sum(probability for token, probability in expected.items() if token <= drawn)
    assert end - expected[drawn] - 1e-6 <= 0.4 <= end + 1e-6


@pytest.mark.parametrize("how", LARGE)
def test_frequencies_are_the_probabilities(how: How) -> None:
    """Random numbers that are spread evenly draw tokens as often as they are probable, to one; independent ones as chance has it."""
    logits, count = large(4.0)[:3000], 4000
    expected = kept_by_sorting(logits, how)
    even = Counter(draw(logits, *how, (i + 0.5) / count) for i in range(count))
    assert all(abs(even[token] - count * probability) < 1.01 for token, probability in expected.items())
    places = torch.rand(count, generator=torch.Generator().manual_seed(7), dtype=torch.float64).tolist()
    drawn = Counter(draw(logits, *how, place) for place in places)
    assert drawn.keys() <= expected.keys()
    frequent = [token for token, probability in expected.items() if probability * count >= 8]
    observed, wanted = [drawn[token] for token in frequent], [expected[token] * count for token in frequent]
    rest = count - sum(wanted)
    if rest > 8:
        observed, wanted = [*observed, count - sum(observed)], [*wanted, rest]
    if len(observed) > 1:
        squares = sum((seen - each) ** 2 / each for seen, each in zip(observed, wanted, strict=True))
        p_value = torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2), torch.tensor(squares / 2))  # of a chi-square distribution
        assert p_value > 1e-3


def test_equal_tokens_are_kept_from_the_first() -> None:
    logits = torch.zeros(2048)
    for name in SETS:
        drawn = {on(name, draw, logits, 1.0, 0, 0.25, 0.0, place / 1024) for place in range(1024)}
        assert drawn == set(range(512))
        assert {on(name, draw, logits, 1.0, 3, 1.0, 0.0, place / 64) for place in range(64)} == {0, 1, 2}


@settings(max_examples=100, deadline=None)
@given(LOGITS.filter(lambda numbers: all(map(math.isfinite, numbers))), st.integers(0, 64), st.data())
def test_log_probabilities(numbers: list[float], count: int, data: st.DataObject) -> None:
    logits = torch.tensor(numbers)
    token = data.draw(st.integers(0, len(numbers) - 1))
    found = [on(name, leading, logits, token, count) for name in SETS]
    assert all(each == found[0] for each in found)
    (first,) = {type(each) for each in found}
    assert first is sampling.Leading
    own = found[0]
    assert isinstance(own, sampling.Leading)
    expected = logits.double().log_softmax(0)
    for other, logit in zip(own.tokens, own.logits, strict=True):
        assert logit == logits[other]
        assert logit - own.largest - own.log_sum == pytest.approx(float(expected[other]), abs=1e-6, rel=1e-6)
    assert own.tokens == logits.argsort(descending=True, stable=True)[:count].tolist()
    assert own.rank == 1 + int((logits > logits[token]).sum())


@pytest.mark.parametrize("how", [(1.3, 0.0, 0.0), (0.7, 0.5, 0.0), (1.0, 0.3, 0.21), (1.1, -0.7, 0.13)])
def test_penalties(how: tuple[float, float, float]) -> None:
    """To the bit; what was only in the prompt is not subtracted from."""
    logits, tokens, times = large(3.0), array("q", [7, 49_999, 0, 300, 20_000]), array("q", [0, 1, 3, 2, 11])
    expected = logits.clone()
    for token, count in zip(tokens, times, strict=True):
        value = expected[token]
        value = value / how[0] if value > 0 else value * how[0]
        expected[token] = value - (how[1] + torch.tensor(count) * how[2]) * (count > 0)
    for name in SETS:
        changed = logits.clone()
        on(name, penalise, changed, tokens, times, *how)
        assert torch.equal(changed, expected)


@pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")
def test_a_penalty_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(IndexError, match="row 9 of a table of 9"):
        penalise(torch.zeros(9), array("q", [9]), array("q", [1]), 1.1, 0.0, 0.0)

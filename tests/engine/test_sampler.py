"""A sequence's sampler: what its parameters leave, penalties over what it has chosen, and a seed that gives the same tokens again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvshare.engine.sampler import Sampler, logprobs_of
from kvshare.engine.sampling import SamplingParams
from kvshare.errors import RequestError

GREEDY = {"temperature": 0.0}


def support(logits: Tensor, params: SamplingParams, draws: int = 300) -> set[int]:
    sampler = Sampler(params, [], seed=0)
    return {sampler.choose(logits.clone()) for _ in range(draws)}


def chosen(logits: Tensor, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> int:
    """By a sampler that has chosen `output` before."""
    sampler = Sampler(params, prompt, seed=0)
    for token in output:
        assert sampler.choose(torch.eye(len(logits))[token] * 1e9) == token
    return sampler.choose(logits.clone())


def test_greedy_takes_the_largest() -> None:
    assert chosen(torch.tensor([0.1, 3.0, -1.0]), SamplingParams(temperature=0)) == 1


def test_top_k_and_min_p_leave_what_their_definitions_leave() -> None:
    logits = torch.tensor([4.0, 3.5, 3.0, 0.0, -2.0])
    assert support(logits, SamplingParams(top_k=2)) == {0, 1}
    assert support(logits, SamplingParams(min_p=0.3)) == {0, 1, 2}  # e^-1 = 0.37 of the largest


def test_min_p_is_applied_before_top_p() -> None:
    logits = torch.tensor([0.4, 0.35, 0.15, 0.1]).log()
    assert support(logits, SamplingParams(top_p=0.55)) == {0, 1}
    assert support(logits, SamplingParams(top_p=0.53, min_p=0.5)) == {0}  # 0.4 of the 0.75 that min-p leaves is more


@pytest.mark.parametrize("size", [3, 512, 1500])
def test_a_draw_inverts_the_cumulative_sum_of_the_whole_vocabulary(size: int) -> None:
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    logits[-size // 3 :] = -torch.inf  # nothing there may be drawn
    cumulative = logits.double().softmax(0).cumsum(0)
    sampler, places = Sampler(SamplingParams(), [], seed=5), random.Random(5)
    for _ in range(50):
        assert sampler.choose(logits.clone()) == int(torch.searchsorted(cumulative, places.random() * cumulative[-1], right=True))


def test_a_seed_gives_its_tokens_again() -> None:
    """These very ones: they are the same on all machines, so that a change of them is noticed."""
    logits = torch.arange(50.0) / 10
    sampler = Sampler(SamplingParams(temperature=0.9, top_p=0.9), [], seed=1234)
    assert [sampler.choose(logits.clone()) for _ in range(6)] == [49, 43, 29, 49, 49, 45]


def test_penalties_are_those_of_the_field() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert chosen(logits, SamplingParams(repetition_penalty=1.2, **GREEDY), prompt=[0]) == 1
    assert chosen(logits, SamplingParams(repetition_penalty=1.2, **GREEDY), output=[0]) == 1
    assert chosen(logits, SamplingParams(presence_penalty=0.2, **GREEDY), output=[0]) == 1
    assert chosen(logits, SamplingParams(presence_penalty=0.2, **GREEDY), prompt=[0]) == 0  # the prompt does not count
    assert chosen(logits, SamplingParams(frequency_penalty=0.06, **GREEDY), output=[0]) == 0
    assert chosen(logits, SamplingParams(frequency_penalty=0.06, **GREEDY), output=[0, 0]) == 1


def test_logprobs_hold_the_chosen_and_the_best_with_their_ranks() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    (row,) = logprobs_of(logits, [3], 2)
    assert list(row) == [3, 1, 2]
    assert [entry.rank for entry in row.values()] == [4, 1, 2]
    assert row[1].logprob == pytest.approx(torch.log_softmax(logits[0], 0)[1].item())


FIELDS = ["n", "top_k", "temperature", "top_p", "min_p", "max_tokens", "logprobs", "frequency_penalty"]


@given(st.sampled_from(FIELDS), st.sampled_from([-5, 1 << 70, float("nan"), True, "1"]))
def test_values_out_of_bounds_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_a_models_defaults_are_greedy_unless_it_says_otherwise() -> None:
    assert SamplingParams.from_generation_config({"do_sample": False, "temperature": 0.7}).greedy
    assert SamplingParams.from_generation_config({}).greedy
    params = SamplingParams.from_generation_config({"do_sample": True, "top_k": 64, "top_p": 0.95}, top_p=None, seed=3)
    assert (params.top_k, params.top_p, params.temperature, params.seed) == (64, 0.95, 1.0, 3)

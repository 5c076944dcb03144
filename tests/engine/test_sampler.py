"""The sampler against plain definitions written with a full sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvshare.engine import sampler
from kvshare.engine.sampler import logprobs_of, sample
from kvshare.engine.sampling import SamplingParams
from kvshare.errors import RequestError


def support(logits: Tensor, params: SamplingParams, draws: int = 300) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {sample(logits.clone(), params, generator, [], []) for _ in range(draws)}


def nucleus_by_sorting(probabilities: Tensor, mass: float) -> set[int]:
    values, places = probabilities.sort(descending=True)
    return set(places[: int((values.cumsum(0) < mass).sum()) + 1].tolist())


def test_greedy_takes_the_largest() -> None:
    assert sample(torch.tensor([0.1, 3.0, -1.0]), SamplingParams(temperature=0), torch.Generator(), [], []) == 1


def test_top_k_and_min_p_leave_what_their_definitions_leave() -> None:
    logits = torch.tensor([4.0, 3.5, 3.0, 0.0, -2.0])
    assert support(logits, SamplingParams(top_k=2)) == {0, 1}
    assert support(logits, SamplingParams(min_p=0.3)) == {0, 1, 2}  # e^-1 = 0.37 of the largest


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0, 6.0])
def test_nucleus_equals_sorting_on_a_large_vocabulary(mass: float, spread: float) -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(3)) * spread
    probabilities = logits.softmax(0)
    kept = sampler._nucleus(probabilities, mass)
    expected = probabilities[list(nucleus_by_sorting(probabilities, mass))]
    assert kept.sum().item() == pytest.approx(expected.sum().item(), abs=2e-4)
    assert abs(int((kept > 0).sum()) - len(expected)) <= max(1, len(expected) // 1000)


@pytest.mark.parametrize("size", [3, 512, 1500])
def test_a_draw_inverts_the_cumulative_sum_of_the_whole_vocabulary(size: int) -> None:
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    logits[-size // 3 :] = -torch.inf  # nothing there may be drawn
    cumulative = logits.softmax(0).double().cumsum(0)
    drawn, places = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for _ in range(50):
        expected = torch.searchsorted(cumulative, torch.rand((), generator=places, dtype=torch.float64) * cumulative[-1], right=True)
        assert sample(logits.clone(), SamplingParams(), drawn, [], []) == int(expected)


def test_a_nucleus_holds_the_first_of_equal_tokens() -> None:
    kept = sampler._nucleus(torch.full((2048,), 2.0**-11), 0.25)
    assert torch.equal(kept.nonzero()[:, 0], torch.arange(512))


def test_frequencies_follow_the_probabilities() -> None:
    generator, logits = torch.Generator().manual_seed(1), torch.tensor([0.7, 0.2, 0.1]).log()
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[sample(logits.clone(), SamplingParams(), generator, [], [])] += 1
    assert (counts / 4000 - torch.tensor([0.7, 0.2, 0.1])).abs().max() < 0.03


def test_penalties_are_those_of_the_field() -> None:
    generator = torch.Generator()
    logits = torch.tensor([2.0, 1.9, -1.0])
    greedy = {"temperature": 0.0}
    assert sample(logits.clone(), SamplingParams(repetition_penalty=1.2, **greedy), generator, [0], []) == 1
    assert sample(logits.clone(), SamplingParams(presence_penalty=0.2, **greedy), generator, [], [0]) == 1
    assert sample(logits.clone(), SamplingParams(presence_penalty=0.2, **greedy), generator, [0], []) == 0  # the prompt does not count
    assert sample(logits.clone(), SamplingParams(frequency_penalty=0.06, **greedy), generator, [], [0]) == 0
    assert sample(logits.clone(), SamplingParams(frequency_penalty=0.06, **greedy), generator, [], [0, 0]) == 1


def test_logprobs_hold_the_chosen_and_the_best_with_their_ranks() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    (row,) = logprobs_of(logits, torch.tensor([3]), 2)
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

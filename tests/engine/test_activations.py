"""Activations rounded to int8 where they meet blocks: everywhere, alike for any number of rows, in replayed steps as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvshare import LLM, SamplingParams, kernels
from kvshare.errors import RequestError
from kvshare.kernels.native import ISAS
from kvshare.kernels.quantized_weight import QuantizedWeight

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")
PROMPTS = ["In the beginning", "And it came to pass", "Behold, I will", "The LORD is"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


def load(activations: str = "int8", weights: str = "int4") -> LLM:
    return LLM("demo", weights=weights, activations=activations, weight_cache=False, max_context=128, max_sequences=4, progress=False)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load()


def products(llm: LLM) -> Iterator[QuantizedWeight]:
    for module in llm.model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, QuantizedWeight))


def logprobs(llm: LLM, prompts: list[str]) -> list[list[float]]:
    outputs = [output.outputs[0] for output in llm.generate(prompts, GREEDY)]
    return [[there[token].logprob for token, there in zip(output.token_ids, output.logprobs or (), strict=True)] for output in outputs]


@needs_kernels
def test_every_product_with_blocks_rounds(llm: LLM) -> None:
    widths = [weight.activations for weight in products(llm)]
    assert len(widths) > 20  # linear layers of ten blocks, and the head
    assert set(widths) == {"int8"}
    assert {weight.activations for weight in products(load("int16"))} == {"int16"}


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_an_answer_does_not_depend_on_those_beside_it(isa: str, llm: LLM) -> None:
    with kernels.use_isa(isa) as has:
        if not has:
            pytest.skip(f"this processor has no {isa}")
        assert logprobs(llm, PROMPTS) == [found for prompt in PROMPTS for found in logprobs(llm, [prompt])]
    assert llm.engine.runner.decode_steps.describe() == "decode steps replayed in 1 native call"


@needs_kernels
def test_rounding_shows_and_costs_little(llm: LLM) -> None:
    rounded, exact = (torch.tensor(logprobs(each, PROMPTS[:1])) for each in (llm, load("int16")))
    assert 0 < (rounded[:, 0] - exact[:, 0]).abs().max() < 0.1  # the first token: behind it answers may part


@needs_kernels
def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(RequestError, match="there are none here"):
        load(weights="bf16")
    with pytest.raises(RequestError, match="unknown 'int4': choose one of int16, int8"):
        load("int4")


def test_without_kernels_there_is_nothing_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    with pytest.raises(RequestError, match="there are none here"):
        load(weights="auto")

"""Full layers whose keys follow from their values store V alone, or V and the rotated part of K: the keys, the logits and the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.harness import PRECISION, Paged, assert_equals_oracle, chunked, greedy, load, oracle_greedy, oracle_logits, random_ids
from parity.test_gemma4 import VOCAB, tiny_gemma4
from torch import Tensor

from kvshare.cache.paged_step import PagedStep
from kvshare.cache.step import DenseStep, Step
from kvshare.models.gemma4 import Gemma4

FULL = 2  # the first full layer of the tiny 26B-A4B and 31B
FORMS = ("compact", "v-only")


def keys_in_cache(directory: Path, kv_form: str, dtype: torch.dtype, layer: int = FULL) -> Tensor:  # [rows, kv_heads, width]
    """The keys that the queries of a next token would see, after a prompt in chunks."""
    model = load(directory, dtype, kv_form)
    assert isinstance(model, Gemma4)
    paged, ids = Paged(model, 1, dtype=dtype), random_ids(VOCAB, sequences=1, tokens=57)[0]
    for start in range(0, len(ids), 19):
        paged.step([ids[start : start + 19]])
    paged.sequences[0].reserve(1)
    step: Step = PagedStep(paged.cache, paged.sequences, [1])
    rows = {s.name: step.rows(layer, s.name, 0)[: len(ids)] for s in model.layout.streams_of(layer)}
    if kv_form == "plain":
        return rows["k"]
    with torch.no_grad():
        return model.blocks[layer].attention.keys_from(rows, torch.arange(len(ids)))


def units_in_last_place(value: Tensor) -> Tensor:
    """Distance to the next bfloat16 number."""
    return torch.exp2(value.float().abs().log2().floor() - 7)


@pytest.mark.parametrize("kv_form", FORMS)
def test_keys_in_float32_are_the_same_numbers(kv_form: str, tmp_path: Path) -> None:
    tiny_gemma4("31B", tmp_path)
    plain = keys_in_cache(tmp_path, "plain", torch.float32)
    assert torch.equal(keys_in_cache(tmp_path, kv_form, torch.float32), plain)


@pytest.mark.parametrize("kv_form", FORMS)
def test_keys_in_bfloat16_are_two_units_away_at_most(kv_form: str, tmp_path: Path) -> None:
    """A rotated number counts in units of the larger of its pair: where the two cancel, its own are arbitrarily small."""
    tiny_gemma4("31B", tmp_path)
    plain = keys_in_cache(tmp_path, "plain", torch.bfloat16)
    rebuilt = keys_in_cache(tmp_path, kv_form, torch.bfloat16)
    difference = (rebuilt.float() - plain.float()).abs()
    assert difference.any()  # V was rounded before the weight
    moving = torch.zeros(32, dtype=torch.bool)
    moving[:4] = moving[16:20] = True  # a quarter of 16 pairs
    assert (difference <= 2 * units_in_last_place(plain))[..., ~moving].all()
    pair = torch.maximum(plain.abs(), plain.roll(16, dims=-1).abs())
    assert (difference <= 2 * units_in_last_place(pair))[..., moving].all()
    if kv_form == "compact":
        assert torch.equal(rebuilt[..., moving], plain[..., moving])  # these are stored


def test_keys_are_not_the_values(tmp_path: Path) -> None:
    """One projection makes both, but the key norm's weight and the rotation lie between: a cache that aliases them is wrong."""
    tiny_gemma4("31B", tmp_path)
    model = load(tmp_path)
    paged, ids = Paged(model, 1), random_ids(VOCAB)[0]
    paged.step([ids])
    paged.sequences[0].reserve(1)
    step = PagedStep(paged.cache, paged.sequences, [1])
    assert (step.rows(FULL, "k", 0)[:41] - step.rows(FULL, "v", 0)[:41]).abs().max() > 1


@pytest.mark.parametrize("kv_form", FORMS)
@pytest.mark.parametrize("name", ["26B-A4B", "31B"])
def test_logits_equal_transformers(name: str, kv_form: str, tmp_path: Path) -> None:
    oracle = tiny_gemma4(name, tmp_path)
    ids = random_ids(VOCAB)
    model = load(tmp_path, kv_form=kv_form)
    assert_equals_oracle(model, oracle_logits(oracle, ids), ids)
    assert torch.equal(greedy(model, ids[:, :20], 16), oracle_greedy(oracle, ids[:, :20], 16))


@pytest.mark.parametrize("kv_form", FORMS)
def test_gradients_are_those_of_the_plain_form(kv_form: str, tmp_path: Path) -> None:
    tiny_gemma4("31B", tmp_path)
    ids, gradients = random_ids(VOCAB)[0], []
    for form in ("plain", kv_form):
        model = load(tmp_path, kv_form=form).requires_grad_(True)
        model.logits(model(ids, DenseStep(model.layout, [41]))).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kv_form", FORMS)
def test_bfloat16_differs_from_plain_by_no_more_than_rounding_does(kv_form: str, tmp_path: Path) -> None:
    """The divergence from the plain cache stays below that of bfloat16 from float32, at any weights."""
    oracle = tiny_gemma4("31B", tmp_path)
    ids = random_ids(VOCAB, sequences=4)
    exact = oracle_logits(oracle, ids).log_softmax(-1)
    sizes = [20, 1, 20]

    def divergence(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    plain = chunked(load(tmp_path, torch.bfloat16), ids, sizes, torch.bfloat16).float().log_softmax(-1)
    other = chunked(load(tmp_path, torch.bfloat16, kv_form), ids, sizes, torch.bfloat16).float().log_softmax(-1)
    assert divergence(plain, other) < divergence(exact, plain)
    assert divergence(exact, other) < 1.5 * divergence(exact, plain)


@pytest.mark.parametrize("dtype", PRECISION)
def test_saving_is_the_planned_one(dtype: torch.dtype, tmp_path: Path) -> None:
    """A full layer keeps 5/8 (compact) and 1/2 (v-only) of its bytes; window layers keep all."""
    tiny_gemma4("31B", tmp_path)
    precision = PRECISION[dtype]
    plain, compact, values = (load(tmp_path, dtype, form).layout.bytes_by_kind(100, 1, precision) for form in ("plain", *FORMS))
    assert compact["full"] * 8 == plain["full"] * 5
    assert values["full"] * 2 == plain["full"]
    assert plain["window"] == compact["window"] == values["window"]

"""Divergence is the KL of whole logits, whatever slices it is added up in, and zero where nothing is lost."""

from __future__ import annotations

import pytest
import tiny
import torch
from parity.harness import chunked, random_ids

from kvshare.evaluation import divergence
from kvshare.evaluation.divergence import Comparison, cached_hidden, divergences

IDS = random_ids(tiny.VOCAB, sequences=3, tokens=70)
WINDOWS = [IDS[0].tolist(), IDS[1, :37].tolist(), IDS[2, :1].tolist()]


def by_hand(reference: str, candidate: str) -> tuple[float, float, float]:
    """KL, worst KL and share of equal top tokens, in float64 from all logits at once."""
    kls, same = [], []
    for ids in WINDOWS:
        one, other = both(ids, reference, candidate)
        kls.append(each_kl(one, other))
        same.append(one.argmax(-1) == other.argmax(-1))
    return torch.cat(kls).mean().item(), torch.cat(kls).max().item(), torch.cat(same).double().mean().item()


def both(ids: list[int], *precisions: str) -> list[torch.Tensor]:  # of each [tokens, vocab]
    return [chunked(tiny.model(), torch.tensor([ids]), [len(ids)], precision=precision)[0].double() for precision in precisions]


def each_kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # 2 x [tokens, vocab] -> [tokens]
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_divergence_is_the_kl_of_whole_logits() -> None:
    found = divergences(tiny.model(), WINDOWS, "bf16", ["int8", "rot2"])
    for one, name in zip(found, ("int8", "rot2"), strict=True):
        kl, largest, same = by_hand("bf16", name)
        assert (one.kl, one.largest) == (pytest.approx(kl, rel=1e-3), pytest.approx(largest, rel=1e-3))
        assert (one.same_top, one.tokens) == (pytest.approx(same), 108)
    assert 0 < found[0].kl < found[1].kl
    assert found[1].same_top < 1


def test_the_reference_does_not_diverge_from_itself() -> None:
    assert divergences(tiny.model(), WINDOWS, "int4", ["int4"]) == [divergence.Divergence(0.0, 0.0, 1.0, 108)]


def test_one_owner_alone_is_between_none_and_all() -> None:
    none, first, every = divergences(tiny.model(), WINDOWS, "fp32", ["fp32", {-1: "fp32", 1: "int4"}, "int4"])
    assert none.kl == 0 < first.kl < every.kl


def test_a_sample_of_positions_is_a_part_of_all() -> None:
    """Of a window without a second sampled position, and of one that ends between two, the rows that count are the same."""
    found = divergences(tiny.model(), WINDOWS, "bf16", ["int8"], every=30)[0]
    assert found.tokens == 3 + 2 + 1
    kl = torch.cat([each_kl(*both(ids, "bf16", "int8"))[::30] for ids in WINDOWS])
    assert (found.kl, found.largest) == (pytest.approx(kl.mean().item(), rel=1e-2), pytest.approx(kl.max().item(), rel=1e-2))


def test_logits_never_exist_for_a_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny.model(), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    divergences(model, WINDOWS, "bf16", ["int8", "int4", "rot3"])
    assert max(rows) == divergence.HEAD_ROWS < 70
    assert len(rows) == (2 + 1 + 1) * 4  # the reference's once for all three candidates


def test_groups_of_candidates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forms, seen = ["int8", "fp8", "int4", "rot4", "rot3"], []
    together = divergences(tiny.model(), WINDOWS, "bf16", forms)
    monkeypatch.setattr(divergence, "TOGETHER", 2)
    assert divergences(tiny.model(), WINDOWS, "bf16", forms, seen.append) == together
    assert seen == [1] * 5 * 3


def test_nothing_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by another comparison with the same memory either, nor where the same precisions are written in another way."""
    known, runs = {}, []
    monkeypatch.setattr(divergence, "cached_hidden", lambda *rest: runs.append(rest[2]) or cached_hidden(*rest))
    first = Comparison(tiny.model(), WINDOWS, "bf16", known=known).of(["int8", "rot3"])
    assert len(runs) == (1 + 2) * len(WINDOWS)
    runs.clear()
    assert Comparison(tiny.model(), WINDOWS, "bf16", known=known).of([{-1: "rot3"}, "int8"]) == first[::-1]
    assert runs == []


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, forms, seen = Comparison(tiny.model(), WINDOWS, "bf16"), ["int8", "int4", "rot3"], []
    monkeypatch.setattr(divergence, "TOGETHER", 1)

    def watch(count: int) -> None:
        seen.append(count)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison.of(forms, watch)
    seen.clear()
    found = comparison.of(forms, lambda count: seen.append(count))
    assert seen == [3, 1, 1, 1, 1, 1, 1]  # a window was done; of the next one only the last candidate had been compared with nothing
    assert found == divergences(tiny.model(), WINDOWS, "bf16", forms)

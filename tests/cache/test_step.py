"""What holds between a model and its step: readers cannot write, the tail changes nothing, few rows are asked for."""

from __future__ import annotations

import hashlib

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity.harness import WAYS, Paged, random_ids

from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.step import DenseStep
from kvshare.cache.tables import SequenceCache
from kvshare.layout import CacheLayout, LayerCache, State, Stream
from kvshare.models.llama import Block, Llama


def paged(model: Llama, tokens: int, keep: list[int] | None) -> tuple[PagedStep, SequenceCache]:
    arena = Arena(64, model.layout.page_bytes("fp32"))
    cache = SequenceCache(model.layout, arena, "fp32")
    cache.reserve(tokens)
    return PagedStep(PagedCache(model.layout, "fp32"), [cache], [tokens], keep), cache


def test_a_reader_cannot_append() -> None:
    model = tiny.model()
    step, _ = paged(model, 5, None)
    row = torch.zeros(5, 2, 8)
    with pytest.raises(RuntimeError, match="layer 3 reads layer 2 and never writes"):
        step.append(3, {"k": row, "v": row})


def test_behind_the_narrowing_nobody_can_append() -> None:
    model = tiny.model()
    step, _ = paged(model, 5, [4])
    row = torch.zeros(5, 2, 8)
    with pytest.raises(RuntimeError, match="never writes"):
        step.tail().append(1, {"k": row, "v": row})


def test_owner_pages_hash_the_same_before_and_after_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    step, cache = paged(model, 40, [39])
    hashes: dict[int, str] = {}
    original = Block.forward

    def hashing(block: Block, *args: object) -> object:
        out = original(block, *args)
        hashes[block.index] = hashlib.sha256(cache.arena.pages.numpy().tobytes()).hexdigest()
        return out

    monkeypatch.setattr(Block, "forward", hashing)
    cache.arena.pages.zero_()
    with torch.no_grad():
        model(random_ids(tiny.VOCAB, 1, 40)[0], step)
    assert hashes[0] != hashes[1] != hashes[2]
    assert hashes[2] == hashes[3] == hashes[4]


def test_layers_behind_the_last_owner_run_on_kept_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny.model(), []
    original = Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, x, *rest: rows.append(len(x)) or original(block, x, *rest))
    mlps = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: mlps.append(len(inputs[0])))
    for keep in ([39], []):
        rows.clear(), mlps.clear()
        step, _ = paged(model, 40, keep)
        with torch.no_grad():
            hidden = model(random_ids(tiny.VOCAB, 1, 40)[0], step)
        assert len(hidden) == len(keep)
        assert rows == [40, 40, 40, 1, 1] if keep else rows == [40, 40, 40]  # blocks are entered with all rows up to the last owner
        assert mlps == [40, 40, 1, 1, 1] if keep else mlps == [40, 40, 0]  # which itself owes the others only its keys and values


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_gives_the_same_logits(way: str) -> None:
    model, ids = tiny.model(), random_ids(tiny.VOCAB, 3, 53)
    reference = WAYS["one shot"](model, ids)
    assert (WAYS[way](model, ids) - reference).abs().max() < 5e-5  # float32 is 1e-5 from float64 here


def test_a_chunk_holds_its_window_and_itself_but_not_the_prompt() -> None:
    model = tiny.model()
    run, ids = Paged(model, 1, context=256), random_ids(tiny.VOCAB, 1, 256)[0]
    for start in range(0, 256, 8):
        run.step([ids[start : start + 8]], keep=[])
    assert run.arena.peak_bytes <= model.layout.peak_bytes(256, 1, "fp32", chunk=8)
    windowed = sum(len(table.pages) for (owner, _), table in run.sequences[0].tables.items() if owner != 1)
    assert windowed <= 4 * 2  # four window streams, a page or two each


def test_dense_step_lets_gradients_reach_an_owner_through_its_reader() -> None:
    model = tiny.model()
    step = DenseStep(model.layout, [12])
    model.logits(model(random_ids(tiny.VOCAB, 1, 12)[0], step)).square().sum().backward()
    for block in model.blocks:
        assert block.attention.qkv.weight.grad is not None
        assert block.attention.qkv.weight.grad.abs().max() > 0


@given(st.lists(st.tuples(st.integers(1, 3000), st.sampled_from(["fp32", "bf16", "int64"])), min_size=1, max_size=5), st.integers(1, 4))
def test_states_lie_end_to_end_and_do_not_touch_each_other(sizes: list[tuple[int, str]], sequences: int) -> None:
    """Whatever their sizes, over however many pages: each is zero at first and holds what was put there, in every sequence."""
    states = tuple(State(f"s{index}", (size,), dtype) for index, (size, dtype) in enumerate(sizes))
    layout = CacheLayout((LayerCache("any", 0, (Stream("k", 1, 8), Stream("v", 1, 8)), states),))
    arena = Arena(200, layout.page_bytes())
    arena.pages.fill_(0xFF)
    caches = [SequenceCache(layout, arena) for _ in range(sequences)]
    for cache in caches:
        cache.reserve(1)
    step = PagedStep(PagedCache(layout, "bf16"), caches, [1] * sequences)
    assert not any(step.state(0, state.name).any() for state in states)
    values = {state.name: torch.randint(-9, 9, (sequences, *state.shape)) for state in states}
    for name, value in values.items():
        step.replace_state(0, name, value)
    assert all(torch.equal(step.state(0, name).long(), value) for name, value in values.items())

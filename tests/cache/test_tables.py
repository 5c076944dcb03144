"""A sequence's pages: exactly what the plan says between steps, never more than its peak inside one, and safe to share."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare.cache.arena import Arena
from kvshare.cache.tables import SequenceCache
from kvshare.layout import CacheLayout, LayerCache, State, Stream

STREAMS = st.builds(
    Stream,
    name=st.just("kv"),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 24, 100]),
    tokens_per_row=st.sampled_from([1, 1, 4, 16]),
    window=st.sampled_from([None, 1, 5, 33, 70]),
)


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    owners = draw(st.lists(STREAMS, min_size=1, max_size=4))
    states = st.sampled_from([(), (State("s", (3, 700), "fp32"),)])
    layers = [LayerCache("any", i, (stream,), draw(states)) for i, stream in enumerate(owners)]
    readers = draw(st.lists(st.integers(0, len(owners) - 1), max_size=3))
    return CacheLayout((*layers, *(LayerCache("any", owner) for owner in readers)))


@settings(max_examples=60, deadline=None)
@given(layouts(), st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_arena_holds_the_plan_between_steps_and_stays_under_the_peak(layout: CacheLayout, steps: list[int]) -> None:
    arena = Arena(4096, layout.page_bytes("fp32"))
    cache, chunk = SequenceCache(layout, arena, "fp32"), max(steps)
    for count in steps:
        cache.reserve(count)
        inside = arena.num_held
        assert inside * arena.page_bytes <= layout.peak_bytes(cache.num_tokens + count, 1, "fp32", chunk)
        cache.commit(count)
        assert arena.held_bytes == layout.held_bytes(cache.num_tokens, 1, "fp32")
        assert arena.num_held == cache.num_pages
    cache.release()
    assert arena.num_free == arena.num_pages


def test_peak_is_reached_and_not_only_bounded() -> None:
    layout = CacheLayout((LayerCache("sliding", 0, (Stream("kv", 1, 32, window=64),)),))
    arena, chunk = Arena(64, layout.page_bytes("bf16")), 96
    cache = SequenceCache(layout, arena)
    for count in (50, 96, 96, 96):
        cache.reserve(count)
        cache.commit(count)
    assert arena.peak_bytes == layout.peak_bytes(cache.num_tokens, chunk=chunk)


def test_a_page_freed_by_a_window_layer_serves_a_full_one() -> None:
    window, full = Stream("kv", 1, 32, window=4), Stream("kv", 1, 64)  # 64 and 32 rows a page
    layout = CacheLayout((LayerCache("sliding", 0, (window,)), LayerCache("full", 1, (full,))))
    arena = Arena(5, layout.page_bytes("bf16"))
    cache = SequenceCache(layout, arena)
    cache.reserve(64)
    (freed,) = cache.tables[0, "kv"].pages
    cache.commit(64)
    cache.reserve(32)
    cache.commit(32)  # the window has left its first page
    assert freed not in cache.tables[0, "kv"].pages
    cache.reserve(1)
    assert cache.tables[1, "kv"].pages[-1] == freed


@settings(max_examples=40, deadline=None)
@given(layouts(), st.integers(1, 80), st.integers(1, 40), st.integers(1, 40))
def test_a_fork_never_changes_the_pages_of_its_origin(layout: CacheLayout, past: int, ours: int, theirs: int) -> None:
    arena = Arena(4096, layout.page_bytes("fp32"))
    cache = SequenceCache(layout, arena, "fp32")
    cache.reserve(past)
    arena.pages.fill_(1)
    cache.commit(past)
    child = cache.fork()
    child.reserve(theirs)
    for table in child.tables.values():  # the child writes its new rows
        for row in range(table.stream.num_rows(past), table.stream.num_rows(past + theirs)):
            page, offset = divmod(row, table.rows_per_page)
            arena.rows(arena.page_bytes // table.rows_per_page)[table.pages[page - table.first_page], offset] = 9
    child.commit(theirs)
    assert all((arena.pages[page] == 1).all() for table in cache.tables.values() for page in table.pages)
    cache.reserve(ours)
    cache.commit(ours)
    assert cache.num_pages == layout.held_pages(past + ours, "fp32")
    assert child.num_pages == layout.held_pages(past + theirs, "fp32")
    arena.check_integrity()
    child.release()
    cache.release()
    assert arena.num_free == arena.num_pages

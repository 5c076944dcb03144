"""The byte formulas against a simulation that appends rows and frees pages one by one, for layouts that hypothesis makes up."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare.errors import ConfigError
from kvshare.layout import PRECISIONS, CacheLayout, LayerCache, State, Stream
from kvshare.layout.precision import read_precision


@dataclass
class Pages:
    """The rows of one stream of one sequence: which pages it holds, row by row."""

    stream: Stream
    rows_per_page: int
    held: set[int] = field(default_factory=set)
    live: set[int] = field(default_factory=set)
    tokens: int = 0

    def append(self, tokens: int) -> None:
        """Rows appear when their last token does; nothing is freed inside a step."""
        for _ in range(tokens):
            self.tokens += 1
            if self.tokens % self.stream.tokens_per_row == 0:
                row = self.tokens // self.stream.tokens_per_row - 1
                self.live.add(row)
                self.held.add(row // self.rows_per_page)

    def free(self) -> None:
        """Between steps: rows behind the window die, and pages without a live row are given back."""
        if self.stream.window is not None and self.live:
            self.live = {row for row in self.live if row > max(self.live) - self.stream.window}
        self.held &= {row // self.rows_per_page for row in self.live}


def simulated(layout: CacheLayout, precision: str) -> list[Pages]:
    return [
        Pages(stream, layout.rows_per_page(index, stream, precision))
        for index in layout.owners
        for stream in layout.stored_in(precision).layers[index].streams
    ]


streams = st.builds(
    Stream,
    name=st.sampled_from(["k", "v", "kv", "entry", "index", "latent"]),
    heads=st.integers(1, 4),
    width=st.sampled_from([1, 7, 32, 64, 100, 512]),
    tokens_per_row=st.sampled_from([1, 1, 2, 4, 128]),
    window=st.one_of(st.none(), st.integers(1, 70)),
)
states = st.builds(State, st.just("tail"), st.tuples(st.integers(1, 40), st.integers(1, 300)), st.sampled_from(["fp32", "bf16"]))


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    layers: list[LayerCache] = []
    for index in range(draw(st.integers(1, 4))):
        owners = [layer.owner for layer in layers if layer.owner == layers.index(layer)]
        if owners and draw(st.booleans()):
            layers.append(LayerCache("reader", draw(st.sampled_from(owners))))
        else:
            layers.append(
                LayerCache(
                    "owner", index, tuple(draw(st.lists(streams, min_size=1, max_size=3))), tuple(draw(st.lists(states, max_size=1)))
                )
            )
    return CacheLayout(tuple(layers))


precisions = st.sampled_from(sorted(PRECISIONS))


@settings(deadline=None)
@given(layouts(), st.integers(0, 300), precisions)
def test_payload_and_pages_equal_a_row_by_row_simulation(layout: CacheLayout, context: int, precision: str):
    pages = simulated(layout, precision)
    for one in pages:
        for _ in range(context):
            one.append(1)
            one.free()
    rows = [len(one.live) * one.stream.row_bytes(PRECISIONS[precision]) for one in pages]
    assert layout.bytes(context, 1, precision) == sum(rows) + layout.state_bytes
    page = layout.page_bytes(precision)
    assert layout.held_bytes(context, 1, precision) == (sum(len(one.held) for one in pages) + -(-layout.state_bytes // page)) * page


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.sampled_from([1, 4, 128]), st.integers(-3, 3), precisions)
def test_held_pages_are_exact_around_every_boundary(window: int, pages: int, tokens_per_row: int, offset: int, precision: str):
    """Contexts next to a window's end, a page's end and a compression block's end, where an error of one row shows."""
    layout = CacheLayout((LayerCache("owner", 0, (Stream("k", 1, 64, tokens_per_row, window), Stream("entry", 1, 64, tokens_per_row))),))
    for stream in layout.layers[0].streams:
        for boundary in (
            window * tokens_per_row,
            pages * layout.rows_per_page(0, stream, precision) * tokens_per_row,
            pages * tokens_per_row,
        ):
            context = min(max(0, boundary + offset), 3000)
            simulation = simulated(layout, precision)
            for one in simulation:
                one.append(context)
                one.free()
            assert layout.held_pages(context, precision) == sum(len(one.held) for one in simulation)


@settings(deadline=None)
@given(st.one_of(st.none(), st.integers(1, 70)), st.integers(1, 80), st.integers(0, 400), st.integers(1, 90), st.integers(1, 3))
def test_newest_rows_are_counted_as_they_are_held(window: int | None, newest: int, context: int, chunk: int, batch: int):
    """Encoded rows as if there were no others, and beside them the newest in 16 bits; a window of no more than these in 16 bits alone."""
    streams = (Stream("k", 2, 64, window=window), Stream("v", 2, 96, window=window), Stream("entry", 1, 64, tokens_per_row=4))
    layout, precision = CacheLayout((LayerCache("owner", 0, streams), LayerCache("reader", 0))), f"rot4+{newest}"
    live = min(context, window or context)
    encoded = live * layout.layers[0].streams[0].row_bytes(PRECISIONS["rot4"]) + live * layout.layers[0].streams[1].row_bytes(
        PRECISIONS["rot4"]
    )
    plain = 2 * 2 * (64 + 96)
    pair = live * plain if window is not None and window <= newest else encoded + min(context, newest) * plain
    assert layout.bytes(context, 1, precision) == pair + context // 4 * (64 // 2 + 2)
    pages = simulated(layout, precision)
    assert len(pages) == (3 if window is not None and window <= newest else 5)
    done = 0
    while done < context:
        size = min(chunk, context - done)
        for one in pages:
            one.append(size)
        assert sum(len(one.held) for one in pages) <= layout.peak_pages(context, 1, precision, chunk)
        for one in pages:
            one.free()
        done += size
    assert layout.held_pages(context, precision) == sum(len(one.held) for one in pages)
    assert layout.stored_in(precision).stored_in(precision) == layout.stored_in(precision)
    assert layout.peak_pages(context, batch, precision, chunk) >= batch * layout.held_pages(context, precision)
    read = (
        min(live, newest) * plain
        if window is not None and window <= newest
        else encoded * max(0, live - newest) // max(1, live) + min(live, newest) * plain
    )
    assert layout.read_bytes(context, 1, precision) == 2 * (read + context // 4 * (64 // 2 + 2))


@pytest.mark.parametrize("name", ["rot4+", "rot4+0", "rot4+x", "rot4+-1", "bf16+32", "fp32+1", "native+8", "nothing+8", "+8", "rot4+8+8"])
def test_precisions_that_keep_no_newest_rows_are_refused(name: str):
    with pytest.raises(ConfigError, match="kv_dtype"):
        read_precision(name, CacheLayout((LayerCache("full", 0, (Stream("k", 1, 8), Stream("v", 1, 8))),)))


@pytest.mark.parametrize("names", [("k_rotated", "v"), ("v",), ("entry", "index")])
def test_owners_without_whole_keys_keep_no_newest_rows(names: tuple[str, ...]):
    layout = CacheLayout((LayerCache("full", 0, tuple(Stream(name, 1, 8) for name in names)),))
    with pytest.raises(ConfigError, match="layer 0 stores"):
        read_precision({0: "rot4+4"}, layout)
    assert read_precision({0: "rot4"}, layout) == {0: "rot4"}


def test_owners_whose_rows_are_selected_keep_no_newest_rows():
    layout = CacheLayout((LayerCache("latent", 0, (Stream("latent", 1, 64, top_k=8), Stream("index", 1, 16))),))
    with pytest.raises(ConfigError, match="an indexer selects"):
        read_precision("rot4+4", layout)


@settings(deadline=None)
@given(layouts(), st.integers(0, 3000), st.integers(1, 5), precisions, st.integers(1, 700), st.integers(0, 8))
def test_payload_fits_what_is_held_and_what_is_held_fits_the_peak(
    layout: CacheLayout, context: int, batch: int, precision: str, chunk: int, draft: int
):
    payload, held = layout.bytes(context, batch, precision), layout.held_bytes(context, batch, precision)
    assert payload <= held <= layout.peak_bytes(context, batch, precision, chunk, draft)
    assert payload == sum(layout.bytes_by_kind(context, batch, precision).values())
    assert payload == batch * layout.bytes(context, 1, precision)
    assert layout.bytes_by_kind(context, batch, precision)["shared"] == 0


@settings(deadline=None)
@given(layouts(), st.integers(0, 3000), st.integers(1, 4), precisions)
def test_more_context_or_batch_never_has_a_lower_peak(layout: CacheLayout, context: int, batch: int, precision: str):
    """What the search for the longest context and the largest batch relies on."""
    peak = layout.peak_bytes(context, batch, precision)
    assert peak <= layout.peak_bytes(context + 1, batch, precision)
    assert peak <= layout.peak_bytes(context, batch + 1, precision)


@settings(deadline=None)
@given(layouts(), st.data())
def test_no_sequence_of_steps_holds_more_than_the_peak(layout: CacheLayout, data: st.DataObject):
    """Prompts in chunks that are split over sequences, drafted decode steps in the others, pages freed only between steps."""
    batch, limit = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 160))
    chunk, draft = data.draw(st.integers(1, 90)), data.draw(st.integers(0, 4))
    sequences = [simulated(layout, "bf16") for _ in range(batch)]
    reserved = layout.peak_pages(limit, batch, "bf16", chunk, draft)
    states = batch * -(-layout.state_bytes // layout.page_bytes())
    for _ in range(data.draw(st.integers(1, 12))):
        left = chunk
        for pages in sequences:
            room = limit - (pages[0].tokens if pages else 0)
            rows = min(room, data.draw(st.integers(0, max(left, 1 + draft))))
            left -= rows if rows > 1 + draft else 0
            for one in pages:
                one.append(rows)
        assert states + sum(len(one.held) for pages in sequences for one in pages) <= reserved
        for pages in sequences:
            for one in pages:
                one.free()


@pytest.mark.parametrize("window", [1, 6, 29, 31, 32, 33, 60, 64, 65])
@pytest.mark.parametrize(("chunk", "draft"), [(1, 0), (20, 0), (20, 3), (64, 0), (70, 0)])
def test_the_peak_covers_the_worst_split_of_a_chunk_over_sequences(window: int, chunk: int, draft: int):
    """Every position and every split of a chunk over two and three sequences, tried out; the bound is at most a page a sequence loose."""
    layout = CacheLayout((LayerCache("sliding", 0, (Stream("k", 1, 64, window=window),)),))
    rows = layout.rows_per_page(0, layout.layers[0].streams[0])
    positions = range(window, window + 2 * rows)

    def most(appended: int) -> int:
        """Pages inside a step that appends this many rows, wherever the sequence stands."""
        return max(-(-(before + appended) // rows) - (before - window) // rows for before in positions)

    pages = {appended: most(appended) for appended in range(max(chunk, 1 + draft) + 1)}
    alone = max(pages.values())
    assert alone == layout.peak_pages(10_000, 1, "bf16", chunk, draft)
    split = max(pages[first] + pages[max(chunk - first, 1 + draft)] for first in range(1 + draft, max(chunk, 2 + draft)))
    thirds = [(a, b) for a in range(1, chunk) for b in range(1, chunk - a)]
    three = max((pages[a] + pages[b] + pages[max(chunk - a - b, 1 + draft)] for a, b in thirds), default=0)
    for batch, worst in ((2, max(split, alone + pages[1 + draft])), (3, max(three, alone + 2 * pages[1 + draft]))):
        assert worst <= layout.peak_pages(10_000, batch, "bf16", chunk, draft) <= worst + batch - 1


@settings(deadline=None)
@given(layouts(), st.integers(500, 3000), precisions)
def test_what_a_token_adds_at_the_margin(layout: CacheLayout, context: int, precision: str):
    block = 128
    context = context // block * block + 70 * block  # every window is full, and every block of tokens closed
    added = layout.bytes(context + block, 1, precision) - layout.bytes(context, 1, precision)
    assert added == block * layout.bytes_per_token(precision)


@settings(deadline=None)
@given(layouts(), st.integers(0, 600), precisions)
def test_sharing_and_windows_only_ever_save(layout: CacheLayout, context: int, precision: str):
    stored = layout.bytes(context, 1, precision)
    assert stored <= layout.without_sharing().bytes(context, 1, precision)
    assert stored <= layout.without_windows().bytes(context, 1, precision)


def test_reading_is_not_saved_by_sharing():
    """Each reader reads its owner's rows again, so a decode step reads what the unshared model would have stored."""
    keys = (Stream("k", 1, 64), Stream("v", 1, 64))
    layout = CacheLayout((LayerCache("full", 0, keys), LayerCache("full", 0), LayerCache("full", 0)))
    assert layout.read_bytes(100) == 3 * layout.bytes(100) == layout.without_sharing().bytes(100)


def test_precision_may_differ_by_owner():
    keys = (Stream("k", 1, 64),)
    layout = CacheLayout((LayerCache("full", 0, keys), LayerCache("full", 1, keys)))
    assert layout.bytes(10, 1, {1: "int8"}) == 10 * 2 * 64 + 10 * (64 + 2)
    assert layout.bytes(10, 1, {-1: "fp32", 1: "int8"}) == 10 * 4 * 64 + 10 * (64 + 2)

"""Attention of many queries over pages equals plain torch on gathered rows, in every instruction set."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import codec_for
from kvshare.cache.tables import PageTable
from kvshare.kernels.row_kind import row_kind
from kvshare.kernels.tile_attention import Rows, TileAttention, TileSpan
from kvshare.layers.attention import attention
from kvshare.layout import Stream
from kvshare.layout.rows import BlockRow, precision_named

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

BOUND = 2.0**-6  # values are of size 1; bfloat16 weights and results have 8 bits


class Kind(NamedTuple):
    key_width: int
    value_width: int
    same: bool = False  # values are the keys
    window: int | None = None
    tokens_per_row: int = 1


class Case:
    """Sequences of random rows in an arena whose other bytes are NaN, their pages in random order."""

    def __init__(
        self,
        kinds: Sequence[Kind],
        positions: Sequence[Sequence[int]],  # of each sequence's queries
        kv_heads: int = 1,
        group: int = 2,
        codec: str = "bf16",
        native: BlockRow | None = None,  # instead of `codec`
        chosen: Tensor | None = None,  # [queries, n] rows of the last kind
    ):
        generator = torch.Generator().manual_seed(len(positions[0]) + group)
        self.kinds, self.places, self.chosen, self.kv_heads = kinds, positions, chosen, kv_heads
        key_width, value_width = kinds[0].key_width, kinds[0].value_width
        page_bytes = 4096 * max(1, kv_heads * max(key_width, value_width) * 2 * 8 // 4096)
        self.arena = Arena(4096, page_bytes)
        self.arena.pages.fill_(0xFF)
        free = torch.randperm(self.arena.num_pages, generator=generator).tolist()
        precision = precision_named("native" if native else codec)
        self.seen: list[list[tuple[Tensor, Tensor]]] = []  # by sequence and kind: keys and values [rows, kv_heads, width]
        self.spans, start, bound = [], 0, []
        for places in positions:
            seen, rows = [], []
            for index, kind in enumerate(kinds):
                end = (places[-1] + 1) // kind.tokens_per_row
                first = max(0, (places[0] + 1) // kind.tokens_per_row - kind.window) if kind.window else 0
                tables, values = [], []
                for width in (kind.key_width,) if kind.same else (kind.key_width, kind.value_width):
                    stream = Stream("k", kv_heads, width, kind.tokens_per_row, kind.window, native=native)
                    form = codec_for(precision, stream)
                    encoded = form.encode(torch.randn(max(end, 1), kv_heads, width, generator=generator).bfloat16())[:end]
                    table = PageTable(0, stream, page_bytes // stream.row_bytes(precision))
                    table.first_page = first // table.rows_per_page
                    table.pages = array("i", (free.pop() for _ in range(table.first_page, -(-end // table.rows_per_page))))
                    view = self.arena.rows(stream.row_bytes(precision))
                    for row in range(first, end):
                        page, offset = divmod(row, table.rows_per_page)
                        view[table.pages[page - table.first_page], offset] = encoded[row]
                    tables.append(table)
                    values.append(form.decode(encoded, kv_heads, width).bfloat16())
                    if len(bound) <= index:
                        bound.append([])
                    if len(bound[index]) < 4:
                        bound[index] += [stream, row_kind(form)]
                seen.append((values[0], values[-1]))
                last = chosen[start : start + len(places)] if chosen is not None and index == len(kinds) - 1 else None
                rows.append(Rows(tables[0], tables[-1], last))
            self.seen.append(seen)
            self.spans.append(TileSpan(start, len(places), rows))
            start += len(places)
        self.kernel = TileAttention(self.arena, [tuple(each if len(each) == 4 else each * 2) for each in bound])
        self.q = torch.randn(start + 1, kv_heads * group, key_width, generator=generator).bfloat16()
        self.positions = torch.tensor([place for places in positions for place in places] + [0])
        self.scale = key_width**-0.5

    def run(self, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        out = torch.full((*self.q.shape[:2], self.kernel.value_width), 7.0, dtype=torch.bfloat16)
        self.kernel.attend(self.q, out, self.positions, self.spans, scale=self.scale, softcap=softcap, sinks=sinks)
        assert (out[-1] == 7).all(), "a row that was not asked for was written"
        return out[:-1]

    def expected(self, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:  # float64
        outs = []
        for span, places, seen in zip(self.spans, self.places, self.seen, strict=True):
            masks = []
            for kind, (k, _) in zip(self.kinds, seen, strict=True):
                newest = (torch.tensor(places)[:, None] + 1) // kind.tokens_per_row
                row = torch.arange(len(k))[None]
                hidden = (row >= newest) | (row < newest - (kind.window or len(k)))
                if self.chosen is not None and kind is self.kinds[-1]:
                    keep = torch.zeros(len(places), len(k) + 1, dtype=torch.bool)  # -1 is behind the last
                    hidden = ~keep.scatter_(1, self.chosen[span.start : span.start + len(places)] % (len(k) + 1), True)[:, :-1]
                masks.append(torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, float("-inf")))
            k, v = (torch.cat([pair[side] for pair in seen]).double() for side in (0, 1))
            q = self.q[span.start : span.start + span.num_queries].double()
            outs.append(attention(q, k, v, torch.cat(masks, dim=1), scale=self.scale, softcap=softcap, sinks=sinks))
        return torch.cat(outs)

    def check(self, bound: float = BOUND) -> None:
        sinks = torch.randn(self.q.shape[1], generator=torch.Generator().manual_seed(5))
        for softcap, sink in ((None, None), (2.0, sinks)):
            assert (self.run(softcap, sink).double() - self.expected(softcap, sink)).abs().max() < bound


@pytest.mark.parametrize(
    ("key_width", "value_width", "kv_heads", "group"),
    [(8, 8, 2, 3), (64, 64, 3, 3), (96, 64, 1, 7), (72, 40, 1, 5), (192, 128, 2, 1), (256, 256, 1, 4), (512, 512, 1, 8), (50, 26, 1, 1)],
)
def test_prompts_equal_torch(key_width: int, value_width: int, kv_heads: int, group: int, isa: str) -> None:
    """From the first token on, behind others, single queries, across pages and tiles: all in one batch."""
    positions = [range(5), range(90, 131), range(200, 201), range(1), range(37)]
    Case([Kind(key_width, value_width)], positions, kv_heads, group).check()


@pytest.mark.parametrize("window", [1, 7, 40, 100])
def test_windows_hide_older_rows(window: int, isa: str) -> None:
    Case([Kind(64, 64, window=window)], [range(30), range(150, 260), range(101, 103)], 2, 4).check()


def test_queries_need_not_be_neighbours(isa: str) -> None:
    Case([Kind(64, 64, window=50)], [[3, 50, 51, 140], [0, 99], [199]]).check()


def test_latent_rows_are_keys_and_values(isa: str) -> None:
    Case([Kind(576, 576, same=True)], [range(100, 103)], group=16).check()


def test_a_window_beside_compressed_entries(isa: str) -> None:
    """Two kinds of row in one softmax; the first queries see no entry at all."""
    kinds = [Kind(64, 64, same=True, window=16), Kind(64, 64, same=True, tokens_per_row=4)]
    Case(kinds, [range(130), range(3), range(500, 512), range(777, 778)], group=6).check()


@pytest.mark.parametrize("rows", [[], [2], [0, 3, 17, 18, 40, 99, 100, 130]])
def test_selected_entries_of_one_query(rows: list[int], isa: str) -> None:
    kinds = [Kind(64, 64, same=True, window=16), Kind(64, 64, same=True, tokens_per_row=4)]
    Case(kinds, [range(600, 601)], group=20, chosen=torch.tensor([rows], dtype=torch.long)).check()


@pytest.mark.parametrize(("group", "kv_heads"), [(3, 1), (64, 1), (300, 1), (5, 2)])
def test_every_query_of_a_prompt_has_entries_of_its_own(group: int, kv_heads: int, isa: str) -> None:
    """Some select fewer than others, some nothing; a second sequence beside them."""
    generator = torch.Generator().manual_seed(group)
    rows = torch.full((9, 120), -1)
    for query, count in enumerate((0, 1, 96, 97, 120, 5, 60, 119, 3)):
        rows[query, :count] = torch.randperm(150, generator=generator)[:count].sort().values
    kinds = [Kind(64, 64, same=True, window=16), Kind(64, 64, same=True, tokens_per_row=4)]
    case = Case(kinds, [range(600, 606), range(900, 903)], kv_heads, group, chosen=rows)
    case.check()
    together, out = case.run(), torch.empty_like(case.run())
    for span in case.spans:
        for query in range(span.num_queries):
            each = [Rows(k, v, None if chosen is None else chosen[query : query + 1]) for k, v, chosen in span.rows]
            case.kernel.attend(case.q, out, case.positions, [TileSpan(span.start + query, 1, each)], scale=case.scale)
    assert (out - together).abs().max() < BOUND  # a query alone is cut in more parts


@pytest.mark.parametrize("codec", ["fp32", "fp8", "int8", "int4", "rot8", "rot4", "rot3", "rot2"])
def test_encoded_rows(codec: str, isa: str) -> None:
    bound = 2 * BOUND if codec.startswith("rot") else BOUND  # rotated queries, keys, values and results are rounded, and mixed again
    Case([Kind(64, 64)], [range(90, 131), range(9)], 3, 2, codec).check(bound)
    Case([Kind(96, 96, same=True)], [range(200, 220)], codec=codec).check(bound)


@pytest.mark.parametrize("form", [BlockRow(8, 64, exact=16, align=8), BlockRow(8, 128, scale_bytes=4, exact=8), BlockRow(4, 32)])
def test_rows_in_deepseeks_form(form: BlockRow, isa: str) -> None:
    Case([Kind(96, 96, same=True)], [range(200, 220), range(300, 301)], group=20, native=form).check()


def test_many_heads_over_a_long_row_are_cut_in_parts(isa: str) -> None:
    Case([Kind(64, 64, same=True)], [range(3000, 3001), range(2500, 2502)], group=64).check()


def test_scores_far_apart(isa: str) -> None:
    """One row outweighs all others, late: what was summed up before must shrink, not overflow."""
    case = Case([Kind(64, 64)], [range(250, 300)])
    case.scale = 30.0
    assert (case.run().double() - case.expected()).abs().max() < 4 * BOUND


def test_neither_batch_nor_threads_nor_chunks_change_a_bit(isa: str) -> None:
    case = Case([Kind(64, 64, window=300)], [range(400), range(90, 131), range(1000, 1002)], 2, 12)
    together, before = case.run(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(case.run(), together)
    finally:
        torch.set_num_threads(before)
    out = torch.empty_like(together)
    for start, count, rows in case.spans:
        case.kernel.attend(case.q, out, case.positions, [TileSpan(start, count, rows)], scale=case.scale)
    assert torch.equal(out, together)
    for start in range(0, 400, 57):
        span = TileSpan(start, min(57, 400 - start), case.spans[0].rows)
        case.kernel.attend(case.q, out, case.positions, [span], scale=case.scale)
    assert torch.equal(out, together)

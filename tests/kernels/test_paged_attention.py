"""Attention over pages equals plain torch on gathered rows, in every instruction set."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import codec_for
from kvshare.cache.tables import PageTable, page_runs
from kvshare.kernels.paged_attention import AttendedRows, PagedAttention
from kvshare.kernels.row_kind import row_kind
from kvshare.kernels.step_spans import StepSpans, TokenSpan
from kvshare.layers.attention import attention
from kvshare.layout import LayerCache, Stream
from kvshare.layout.newest import with_newest
from kvshare.layout.rows import precision_named

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

SHAPES = {  # kv heads, query heads of each, key width, value width
    "tiny": (2, 3, 8, 8),
    "one wide head": (1, 8, 512, 512),
    "smollm2": (3, 3, 64, 64),
    "heads of their own": (3, 1, 128, 128),
    "seven": (2, 7, 256, 256),
    "many heads, other values": (1, 20, 96, 64),
    "odd widths": (1, 5, 72, 40),
}


class Case:
    """Sequences of random rows in an arena whose other bytes are NaN, their pages in random order."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        lengths: list[int],
        dtype: torch.dtype,
        window: int | None = None,
        codecs: tuple[str, str] | None = None,  # of keys and values; None: plain rows of `dtype`
    ):
        self.kv_heads, group, key_width, value_width = shape
        generator = torch.Generator().manual_seed(sum(lengths))
        plain = "bf16" if dtype == torch.bfloat16 else "fp32"
        named = [codec_for(precision_named(name), Stream("k", 1, 1)) for name in codecs or (plain, plain)]
        widest = self.kv_heads * max(key_width, value_width) * dtype.itemsize
        page_bytes = -(-widest * 32 // 4096) * 4096
        self.arena = Arena(8 + sum(length // 16 + 2 for length in lengths), page_bytes)
        self.arena.pages.fill_(0xFF)
        free = torch.randperm(self.arena.num_pages, generator=generator).tolist()
        self.q = torch.randn(len(lengths) + 1, self.kv_heads * group, key_width, generator=generator).to(dtype)
        self.rows, self.spans = [], []
        self.tables: list[PageTable] = []  # whose pages the spans lead to
        for row, length in enumerate(lengths):
            first = 0 if window is None else max(0, length - window)
            tables, seen = [], []
            for codec, width in zip(named, (key_width, value_width), strict=True):
                values = torch.randn(length, self.kv_heads, width, generator=generator).to(dtype)
                encoded = codec.encode(values)  # [rows, row_bytes]
                row_bytes = encoded.shape[1]
                table = PageTable(0, Stream("k", self.kv_heads, width), page_bytes // row_bytes)
                table.first_page = first // table.rows_per_page
                table.pages = array("i", (free.pop() for _ in range(table.first_page, -(-length // table.rows_per_page))))
                view = self.arena.rows(row_bytes)
                for index in range(table.first_page * table.rows_per_page, length):
                    page, offset = divmod(index, table.rows_per_page)
                    view[table.pages[page - table.first_page], offset] = encoded[index]
                tables.append(table)
                seen.append(codec.decode(encoded[first:], self.kv_heads, width))
            self.rows.append(seen)
            self.tables += tables
            self.spans.append(TokenSpan(page_runs(tables), length - 1, 1, row))
        kinds = row_kind(named[0]), row_kind(named[1])
        assert kinds[0] is not None
        assert kinds[1] is not None
        rows = [AttendedRows(kinds[0], kinds[1], window=window)]
        self.kernel = PagedAttention(self.arena, self.kv_heads, (key_width, value_width), rows, dtype)
        self.scale = key_width**-0.5

    def run(self, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        out = torch.full((*self.q.shape[:2], self.kernel.value_width), 7.0, dtype=self.q.dtype)
        self.kernel.attend(self.q, out, StepSpans(self.spans), scale=self.scale, softcap=softcap, sinks=sinks)
        assert (out[-1] == 7).all(), "a row that was not asked for was written"
        return out[:-1]

    def expected(self, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:  # float64
        outs = [
            attention(self.q[i : i + 1].double(), k.double(), v.double(), None, scale=self.scale, softcap=softcap, sinks=sinks)
            for i, (k, v) in enumerate(self.rows)
        ]
        return torch.cat(outs)


BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}  # values are of size 1; bfloat16 weights and results have 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_torch(shape: str, dtype: torch.dtype, isa: str) -> None:
    heads = SHAPES[shape][0] * SHAPES[shape][1]
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(5))
    for lengths, window in (([1], None), ([31, 32, 33, 130], None), ([500, 7, 90], 40)):
        case = Case(SHAPES[shape], lengths, dtype, window)
        for softcap, sink in ((None, None), (2.0, sinks)):
            assert (case.run(softcap, sink).double() - case.expected(softcap, sink)).abs().max() < BOUNDS[dtype]


def test_many_parts_of_a_long_sequence_are_one_softmax(isa: str) -> None:
    for lengths, window in (([2100, 513], None), ([1800], 1537)):  # in eight parts of uneven length, and in four
        case = Case(SHAPES["smollm2"], lengths, torch.float32, window)
        sinks = torch.randn(9, generator=torch.Generator().manual_seed(5))
        assert (case.run(sinks=sinks).double() - case.expected(None, sinks)).abs().max() < BOUNDS[torch.float32]


ENCODED_BOUNDS = {  # with float32 queries, by codec, in AVX512 and AMX: values are of size 1
    "int8": 0.02,  # weights keep 8 bits
    "rot8": 0.02,
    "rot9": 2e-3,  # its ninth bits meet 7 bits of queries and weights
    "fp8": 2.0**-6,  # queries and weights become bfloat16
    "int4": 0.04,  # queries and weights keep 8 bits
    "rot4": 0.04,
    "rot3": 0.04,
    "rot2": 0.04,
}


@pytest.mark.parametrize("codec", ENCODED_BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_to_encoded_rows_equals_torch_on_decoded_ones(shape: str, codec: str, isa: str) -> None:
    heads = SHAPES[shape][0] * SHAPES[shape][1]
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(5))
    bound = ENCODED_BOUNDS[codec] if isa in ("amx", "avx512") else 4e-6
    for lengths, window in (([1], None), ([31, 32, 33, 130], None), ([500, 7, 90], 40)):
        case = Case(SHAPES[shape], lengths, torch.float32, window, (codec, codec))
        for softcap, sink in ((None, None), (2.0, sinks)):
            difference = case.run(softcap, sink).double() - case.expected(softcap, sink)
            assert difference.abs().max() < bound


@pytest.mark.parametrize("codecs", [("int8", "int4"), ("rot8", "rot4"), ("bf16", "int8"), ("fp8", "bf16")])
def test_keys_and_values_may_have_different_codecs(codecs: tuple[str, str], isa: str) -> None:
    case = Case((2, 3, 64, 96), [150, 33], torch.bfloat16, None, codecs)
    assert (case.run().double() - case.expected()).abs().max() < 0.03 + BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("codec", ["int8", "rot9", "int4"])
def test_queries_make_up_for_balanced_keys(codec: str, isa: str) -> None:
    balance = 2.0 ** torch.randint(-3, 4, (2, 64), generator=torch.Generator().manual_seed(1))
    case = Case((2, 3, 64, 64), [150, 33], torch.float32, None, (codec, codec))
    kind = row_kind(codec_for(precision_named(codec), Stream("v", 2, 64)))
    assert kind is not None
    case.kernel = PagedAttention(case.arena, 2, (64, 64), [AttendedRows(kind, kind)], torch.float32, balance)
    for each in case.rows:
        each[0] = each[0] * balance
    case.scale /= 8
    assert (case.run().double() - case.expected()).abs().max() < (ENCODED_BOUNDS[codec] if isa in ("amx", "avx512") else 4e-6)


@pytest.mark.parametrize("codecs", [("rot4", "rot4"), ("int8", "int4")])
@pytest.mark.parametrize("newest", [1, 7, 40, 400])
def test_older_rows_encoded_and_newest_in_16_bits_are_one_softmax(newest: int, codecs: tuple[str, str], isa: str) -> None:
    """Against torch on the rows that each query sees; some sequences have fewer rows than are kept exact."""
    lengths, shape = [1, 33, 130, 500], (2, 3, 64, 96)
    forms = [replace(precision_named(name), newest=newest) for name in codecs]
    streams = with_newest(LayerCache("full", 0, (Stream("k", 2, 64), Stream("v", 2, 96))), 0, newest).streams
    kinds = [(streams[0], streams[1]), (streams[2], streams[3])]
    spelled = [[codec_for(form, stream) for form, stream in zip(forms, pair, strict=True)] for pair in kinds]
    case = Case(shape, lengths, torch.bfloat16)
    generator, arena = torch.Generator().manual_seed(2), Arena(200, case.arena.page_bytes)
    rows, spans, tables = [], [], []  # tables are read where they lie
    free = list(range(200))
    for row, length in enumerate(lengths):
        values = [torch.randn(length, 2, width, generator=generator).bfloat16() for width in (64, 96)]
        split, read, own = max(0, length - newest), [], []
        for codec, stream, each in zip([c for pair in spelled for c in pair], streams, values * 2, strict=True):
            encoded = codec.encode(each)
            table = PageTable(0, stream, arena.page_bytes // encoded.shape[1])
            table.pages = array("i", (free.pop() for _ in range(-(-length // table.rows_per_page))))
            for index in range(length):
                page, offset = divmod(index, table.rows_per_page)
                arena.rows(encoded.shape[1])[table.pages[page], offset] = encoded[index]
            own.append(table)
            decoded = codec.decode(encoded, 2, stream.width).float()
            read.append(decoded[split:] if stream.newest_of else decoded[:split])
        rows.append([torch.cat([read[0], read[2]]), torch.cat([read[1], read[3]])])
        tables.append(own)
        spans.append(TokenSpan(page_runs(own), length - 1, 1, row))
    attended = []
    for place, (pair, (k, _)) in enumerate(zip(spelled, kinds, strict=True)):
        keys, numbers = row_kind(pair[0]), row_kind(pair[1])
        assert keys is not None
        assert numbers is not None
        attended.append(AttendedRows(keys, numbers, (2 * place, 2 * place + 1), k.window, k.behind))
    case.rows, case.spans = rows, spans
    case.kernel = PagedAttention(arena, 2, (64, 96), attended, torch.bfloat16)
    assert (case.run().double() - case.expected()).abs().max() < 0.03 + BOUNDS[torch.bfloat16]


def test_scores_far_apart(isa: str) -> None:
    """One row outweighs all others, late: what was summed up before must shrink, not overflow."""
    for dtype in BOUNDS:
        case = Case((1, 2, 64, 64), [300], dtype)
        case.scale = 30.0
        assert (case.run().double() - case.expected()).abs().max() < 4 * BOUNDS[dtype]


@pytest.mark.parametrize("codec", ["int8", "rot8", "int4", "rot4"])
def test_many_small_weights_beside_a_large_one_are_not_lost(codec: str, isa: str) -> None:
    """Each of them is less than half of what the last of 8 bits stands for; rounded to the nearest, all together would count nothing."""
    case = Case((1, 1, 64, 64), [32], torch.float32, None, (codec, codec))
    keys, values = torch.zeros(32, 1, 64), torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(3)).repeat(32, 1, 1)
    keys[5, 0, 0], values[5] = 1, -values[5]  # the only row with a score other than 0; the others are all alike
    for table, rows, place in zip(case.tables, (keys, values), (0, 1), strict=True):
        encoded = codec_for(precision_named(codec), Stream("k", 1, 64)).encode(rows)
        case.arena.rows(encoded.shape[1])[table.pages[0], :32] = encoded
        case.rows[0][place] = codec_for(precision_named(codec), Stream("k", 1, 64)).decode(encoded, 1, 64)
    case.q[0], case.scale = 0, math.log(600)
    case.q[0, 0, 0] = 1 / case.rows[0][0][5, 0, 0]
    expected = case.expected()
    large = case.rows[0][1][5].double()  # what is left where only the large weight counts, of sum 631 / 600
    lost = (expected - large * 600 / 631).norm()
    assert (case.run().double() - expected).norm() < lost / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_batch_nor_threads_change_a_bit(dtype: torch.dtype, isa: str) -> None:
    _changes_no_bit(Case((2, 4, 64, 64), [1000, 40, 333], dtype))


@pytest.mark.parametrize("codec", ENCODED_BOUNDS)
@pytest.mark.parametrize("group", [1, 3, 9])  # one slice of heads, and more than one
def test_neither_batch_nor_threads_change_a_bit_of_encoded_rows(codec: str, group: int, isa: str) -> None:
    _changes_no_bit(Case((2, group, 64, 64), [600, 40, 333], torch.bfloat16, None, (codec, codec)))


def _changes_no_bit(case: Case) -> None:
    together = case.run()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(case.run(), together)
    finally:
        torch.set_num_threads(before)
    out = torch.empty_like(together)
    for span in case.spans:
        case.kernel.attend(case.q, out, StepSpans([span]), scale=case.scale)
    assert torch.equal(out, together)


@pytest.mark.parametrize("codec", ["bf16", *ENCODED_BOUNDS])
def test_forks_that_share_pages_read_what_copies_would(codec: str, isa: str) -> None:
    """Two sequences with the same first pages and ends of their own, beside the same rows in pages of one's own."""
    case = Case((2, 3, 64, 64), [290, 290], torch.bfloat16, None, (codec, codec))
    case.q[1] = case.q[0]
    shared = [len(table.pages) - 1 for table in case.tables[:2]]
    assert min(shared) > 0
    for count, first, second in zip(shared, case.tables[:2], case.tables[2:], strict=True):
        case.arena.pages[list(second.pages[:count])] = case.arena.pages[list(first.pages[:count])]
    apart = case.run()
    for count, first, second in zip(shared, case.tables[:2], case.tables[2:], strict=True):
        case.arena.pages[list(second.pages[:count])] = 0xFF
        second.pages[:count] = first.pages[:count]
    assert torch.equal(case.run(), apart)
    assert not torch.equal(apart[0], apart[1]), "what is not shared must count"

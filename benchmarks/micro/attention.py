"""Attention over pages: one query over a long cache, in every precision; prompts and many heads, in tiles."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.micro import Result, Timed
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import codec_for
from kvshare.cache.tables import PageTable, page_runs
from kvshare.kernels.paged_attention import AttendedRows, PagedAttention
from kvshare.kernels.row_kind import RowKind, row_kind
from kvshare.kernels.step_spans import StepSpans, TokenSpan
from kvshare.kernels.tile_attention import Rows, TileAttention, TileSpan
from kvshare.layers.attention import attention
from kvshare.layout import Stream
from kvshare.layout.rows import precision_named

ONE_QUERY = {  # kv heads, query heads of each, width, rows
    "E2B full": (1, 8, 512, 131072),
    "E2B window": (1, 8, 256, 131072),
    "Llama 3 8B": (8, 4, 128, 32768),
    "SmolLM2": (3, 3, 64, 131072),
    "heads of their own": (8, 1, 128, 32768),
}
ENCODED = ("int8", "rot8", "fp8", "int4", "rot4", "rot3", "rot2")
TILES = {  # kv heads, query heads of each, width, queries, rows in front of them; whether keys are the values
    "SmolLM2": (3, 3, 64, 512, 3584, False),
    "Llama 3 8B": (8, 4, 128, 512, 3584, False),
    "E2B sliding": (1, 8, 256, 512, 512, False),
    "E2B full": (1, 8, 512, 512, 0, False),
    "E2B full at 4K": (1, 8, 512, 512, 3584, False),
    "E2B full at 16K": (1, 8, 512, 512, 15872, False),
    "DeepSeek V4": (1, 64, 512, 1, 131071, True),
}


def one_query(timed: Timed) -> Iterator[Result]:
    """Bound by reading; torch gets the same rows in one piece."""
    for name, (kv_heads, group, width, rows) in ONE_QUERY.items():
        cache = Pages(kv_heads, width, rows, "bf16")
        q = torch.randn(1, kv_heads * group, width).bfloat16()
        k, v = cache.plain_rows()
        other = timed(partial(attention, q, k, v, None, scale=0.05), repeats=3)
        work = f"{name}: {kv_heads} x {group} heads of {width}, {rows} rows"
        yield Result("bf16", work, timed(cache.attention(q)), cache.read_bytes, "read", "scaled_dot_product", other)


def encoded(timed: Timed) -> Iterator[Result]:
    """Caches of fewer bits beside the same rows in bf16."""
    for shape, (kv_heads, group, width, rows) in ONE_QUERY.items():
        q = torch.randn(1, kv_heads * group, width).bfloat16()
        plain = Pages(kv_heads, width, rows, "bf16")
        for name in ENCODED:
            cache = Pages(kv_heads, width, rows, name)
            work = f"{shape}: {kv_heads} x {group} heads of {width}, {rows} rows"
            seconds, other = timed(cache.attention(q)), timed(plain.attention(q))  # one behind the other: the machine moves
            yield Result(name, work, seconds, cache.read_bytes, "read", "the same in bf16", other)


def tiles(timed: Timed) -> Iterator[Result]:
    """Bound by products: two for each pair of a query and a row that it sees."""
    for name, (kv_heads, group, width, count, before, shared) in TILES.items():
        rows, heads = before + count, kv_heads * group
        cache = Pages(kv_heads, width, rows, "bf16")
        keys, values = cache.tables
        q, positions = torch.randn(count, heads, width).bfloat16(), torch.arange(before, rows)
        kind, out, source = RowKind("BF16"), torch.empty_like(q), cache.stream
        kernel = TileAttention(cache.arena, [(source, kind, source if shared else Stream("v", kv_heads, width), kind)])
        span = TileSpan(0, count, [Rows(keys, keys if shared else values)])
        seconds = timed(partial(kernel.attend, q, out, positions, [span], scale=0.05), repeats=3)
        k, v = cache.plain_rows()
        hidden = torch.arange(rows)[None] > positions[:, None]
        mask = torch.zeros(count, rows, dtype=torch.bfloat16).masked_fill_(hidden, float("-inf"))
        other = timed(partial(attention, q, k, k if shared else v, None if count == 1 else mask, scale=0.05), repeats=3)
        pairs = count * before + count * (count + 1) // 2
        work = f"{name}: {count} queries, {heads} heads of {width}, {rows} rows"
        yield Result("tiles", work, seconds, 4 * heads * width * pairs, "gemm", "scaled_dot_product", other)


class Pages:
    """Keys and values in shuffled pages, each row of a page the same as in any other."""

    def __init__(self, kv_heads: int, width: int, rows: int, precision: str):
        self.kv_heads, self.width, self.rows = kv_heads, width, rows
        self.stream = Stream("k", kv_heads, width)
        codec = codec_for(precision_named(precision), self.stream)
        self.kind = row_kind(codec)
        self.row_bytes = precision_named(precision).row_bytes(kv_heads, width)
        page_bytes = -(-kv_heads * width * 2 * 32 // 4096) * 4096
        in_page = page_bytes // self.row_bytes
        count = -(-rows // in_page)
        self.arena = Arena(2 * count, page_bytes)
        self.arena.rows(self.row_bytes)[:] = codec.encode(torch.randn(in_page, kv_heads, width))
        shuffled = torch.randperm(2 * count).tolist()
        halves = shuffled[:count], shuffled[count:]
        self.tables = [PageTable(0, self.stream, in_page, 0, array("i", half)) for half in halves]

    @property
    def read_bytes(self) -> int:
        return 2 * self.rows * self.row_bytes

    def attention(self, q: Tensor) -> partial[None]:
        """The call in which one query, [1, heads, width], attends to all rows; the pages must outlive it."""
        assert self.kind is not None
        kernel = PagedAttention(self.arena, self.kv_heads, (self.width, self.width), [AttendedRows(self.kind, self.kind)], torch.bfloat16)
        spans = StepSpans([TokenSpan(page_runs(self.tables), self.rows - 1, 1, 0)])
        return partial(kernel.attend, q, torch.empty_like(q), spans, scale=0.05)

    def plain_rows(self) -> list[Tensor]:
        """Keys and values in one piece each, [rows, kv_heads, width]; only of bf16 caches."""
        pieces = [self.arena.gather(table.pages, self.row_bytes)[: self.rows] for table in self.tables]
        return [piece.view(torch.bfloat16).unflatten(-1, (self.kv_heads, self.width)) for piece in pieces]

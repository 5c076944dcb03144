"""Attention over pages: one query over a long cache, in every precision; prompts and many heads, in tiles.

Pages lie as an engine leaves them behind a prompt of so many tokens that it read in chunks: keys and values of all layers take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.micro import Result, Timed
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import codec_for
from kvshare.cache.tables import SequenceCache, page_runs
from kvshare.kernels.paged_attention import AttendedRows, PagedAttention
from kvshare.kernels.row_kind import RowKind, row_kind
from kvshare.kernels.step_spans import StepSpans, TokenSpan
from kvshare.kernels.tile_attention import Rows, TileAttention, TileSpan
from kvshare.layers.attention import attention
from kvshare.layout import CacheLayout, Stream, layout_from_config
from kvshare.layout.rows import precision_named
from kvshare.planner import resolve

ONE_QUERY = {  # kv heads, query heads of each, width, rows
    "E2B full": (1, 8, 512, 131072),
    "E2B window": (1, 8, 256, 131072),
    "Llama 3 8B": (8, 4, 128, 32768),
    "SmolLM2": (3, 3, 64, 131072),
    "heads of their own": (8, 1, 128, 32768),
}
CHUNK = 512  # tokens of a prompt that an engine reads at once
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
        cache = Pages(layout_of(name, kv_heads, width), rows, "bf16")
        q = torch.randn(1, kv_heads * group, width).bfloat16()
        k, v = cache.plain_rows()
        other = timed(partial(attention, q, k, v, None, scale=0.05), repeats=3)
        work = f"{name}: {kv_heads} x {group} heads of {width}, {rows} rows"
        attend = cache.attention(q)
        yield Result("bf16", work, timed(attend), cache.read_bytes, "read", "scaled_dot_product", other, timed.alone(attend))


def encoded(timed: Timed) -> Iterator[Result]:
    """Caches of fewer bits beside the same rows in bf16."""
    for shape, (kv_heads, group, width, rows) in ONE_QUERY.items():
        q = torch.randn(1, kv_heads * group, width).bfloat16()
        plain = Pages(layout_of(shape, kv_heads, width), rows, "bf16")
        for name in ENCODED:
            cache = Pages(layout_of(shape, kv_heads, width), rows, name)
            work = f"{shape}: {kv_heads} x {group} heads of {width}, {rows} rows"
            mine, same = cache.attention(q), plain.attention(q)
            seconds, other = timed(mine), timed(same)  # one behind the other: the machine moves
            yield Result(name, work, seconds, cache.read_bytes, "read", "the same in bf16", other, timed.alone(mine), timed.alone(same))


def tiles(timed: Timed) -> Iterator[Result]:
    """Bound by products: two for each pair of a query and a row that it sees."""
    for name, (kv_heads, group, width, count, before, shared) in TILES.items():
        rows, heads = before + count, kv_heads * group
        cache = Pages(layout_of(name, kv_heads, width), rows, "bf16")
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


def layout_of(name: str, kv_heads: int, width: int) -> CacheLayout:
    """Of the model that a shape is named after where that is small enough; otherwise of two layers like it."""
    if name == "E2B full":
        return layout_from_config(resolve("gemma-4-E2B").config)
    heads = {"num_attention_heads": kv_heads, "num_key_value_heads": kv_heads, "head_dim": width, "hidden_size": kv_heads * width}
    return layout_from_config({"model_type": "llama", "num_hidden_layers": 2, **heads})


class Pages:
    """Keys and values of the last owner without a window after `rows` tokens, the rows of each page the same as in any other."""

    def __init__(self, layout: CacheLayout, rows: int, precision: str):
        self.rows, form = rows, precision_named(precision)
        self.arena = Arena(layout.peak_pages(rows, 1, precision, CHUNK), layout.page_bytes(precision))
        cache = SequenceCache(layout, self.arena, precision)
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            cache.reserve(count)
            cache.commit(count)
        owner = layout.last_owner("full")
        self.tables = [cache.tables[owner, name] for name in ("k", "v")]
        self.stream = self.tables[0].stream
        self.kv_heads, self.width = self.stream.heads, self.stream.width
        codec = codec_for(form, self.stream)
        self.kind, self.row_bytes = row_kind(codec), form.row_bytes(self.kv_heads, self.width)
        in_page = codec.encode(torch.randn(self.tables[0].rows_per_page, self.kv_heads, self.width))
        for table in self.tables:
            self.arena.rows(self.row_bytes)[torch.tensor(table.pages)] = in_page

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

"""The engine's step: rows live in the arena's pages, encoded by their owner's codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kvshare import kernels
from kvshare.cache.codecs import Codec, codec_for
from kvshare.cache.codecs.raw import RawCodec
from kvshare.cache.native_attention import NativeAttention
from kvshare.cache.native_selection import NativeSelection
from kvshare.cache.step import KeyRebuild, Step, state_named
from kvshare.cache.tables import SequenceCache
from kvshare.cache.tiled_attention import TiledAttention
from kvshare.kernels.row_kind import RowEncoder, row_encoder
from kvshare.kernels.row_selection import RowSelection, SelectionSpan
from kvshare.kernels.step_spans import StepSpans, TokenSpan
from kvshare.kernels.step_states import StateInPlace
from kvshare.layers.key_from_value import KeyFromValue
from kvshare.layout import CacheLayout, PrecisionChoice, Stream

_STATE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int64": torch.int64, "int32": torch.int32}


class PagedCache:
    """What is the same in every step of an engine: codecs by owner, and where each state lies in a sequence's state pages."""

    def __init__(self, layout: CacheLayout, precision: PrecisionChoice, balance: Mapping[int, Tensor] | None = None):
        """`balance` is the model's `key_balance()`."""
        self.layout = layout = layout.stored_in(precision)
        self.codecs: dict[tuple[int, str], Codec] = {}  # by owner and stream
        self.encoders: dict[tuple[int, str], RowEncoder | None] = {}  # what does a codec's work natively
        self.row_bytes: dict[tuple[int, str], int] = {}
        self.tables: dict[tuple[int, str], tuple[int, int, int]] = {}  # which of a sequence's tables, rows of a page, bytes of a row
        for owner in layout.owners:
            form = layout.precision_of(owner, precision)
            for stream in layout.layers[owner].streams:
                self.codecs[owner, stream.name] = codec_for(form, stream, (balance or {}).get(owner))
                self.encoders[owner, stream.name] = row_encoder(self.codecs[owner, stream.name], stream.heads, stream.width)
                self.row_bytes[owner, stream.name] = stream.row_bytes(form)
                self.tables[owner, stream.name] = len(self.tables), layout.rows_per_page(owner, stream, precision), stream.row_bytes(form)
        self.native_attention = NativeAttention(layout, self.codecs)
        self.tiled_attention = TiledAttention(layout, self.codecs)
        self.native_selection = NativeSelection(layout, self.codecs)
        self.read_again = frozenset(owner for owner in layout.owners if layout.readers(owner))
        self.states: dict[tuple[int, str], tuple[int, int, torch.dtype]] = {}  # first byte and end in a sequence's states
        self.state_places: dict[tuple[int, str], list[tuple[int, int, int]]] = {}  # (which state page, first byte, end), in order
        start = 0
        for index, layer in enumerate(layout.layers):
            for state in layer.states:
                self.states[index, state.name] = start, start + state.num_bytes, _STATE_DTYPES[state.dtype]
                self.state_places[index, state.name] = _places(start, start + state.num_bytes, layout.page_bytes(precision))
                start += state.num_bytes

    def encoded(self, layer: int, stream: Stream, values: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        """New rows of an owner's stream as its codec spells them."""
        encoder = self.encoders[layer, stream.name]
        if encoder is None or not values.is_cpu or values.dtype not in (torch.bfloat16, torch.float32):
            return self.codecs[layer, stream.name].encode(values)
        return encoder.encode(values)


def _places(start: int, end: int, page_bytes: int) -> list[tuple[int, int, int]]:
    """Bytes `start:end` of the states, which lie end to end over a sequence's state pages, page by page."""
    pages = range(start // page_bytes, -(-end // page_bytes))
    return [(page, max(start - page * page_bytes, 0), min(end - page * page_bytes, page_bytes)) for page in pages]


class PagedStep(Step):
    """A step over sequences whose rows lie in an arena. Every cache must have reserved its `counts[s]` tokens."""

    def __init__(self, cache: PagedCache, caches: Sequence[SequenceCache], counts: Sequence[int], reader_rows: Sequence[int] | None = None):
        device = caches[0].arena.pages.device
        super().__init__(cache.layout, [c.num_tokens for c in caches], counts, reader_rows, device)
        self.cache = cache
        self.caches = caches
        self.arena = caches[0].arena
        self._native = kernels.available() and device.type == "cpu"
        self._native_spans: StepSpans | None = None
        self._is_all_single: bool | None = None
        self._gathered: dict[tuple[int, str, int], tuple[int, Tensor]] = {}  # rows that several readers will ask for

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        entries: Tensor | None = None,
        rebuild: KeyRebuild | None = None,
    ) -> Tensor:
        """Where kernels can read the owner's pages, in one call for all sequences with a single query and in one for all others."""
        owner, arena = self.layout.owner[layer], self.arena
        single = self.cache.native_attention.of(owner, arena, q.dtype)
        many = self.cache.tiled_attention.of(owner, arena) if q.dtype == torch.bfloat16 else None
        if many is not None and many.kernel.rebuilds and (not isinstance(rebuild, KeyFromValue) or rebuild.weight.dtype != q.dtype):
            many = None
        if single is None and many is None:
            return super().attend(layer, q, scale=scale, softcap=softcap, sinks=sinks, entries=entries, rebuild=rebuild)
        out = q.new_empty(*q.shape[:2], self.layout.layers[owner].value_width)
        if single is not None and self.all_single and (many is None or not many.takes(1, q.shape[1], entries)):
            single.attend(q, out, self.native_spans, scale=scale, softcap=softcap, sinks=sinks)
            return out
        if many is not None and self.all_single:
            kept = rebuild if isinstance(rebuild, KeyFromValue) else None
            many.attend_singles(q, out, self.native_spans, entries, scale=scale, softcap=softcap, sinks=sinks, rebuild=kept)
            return out
        singles, spans = False, []
        for sequence, span in enumerate(self.spans):
            tables = self.caches[sequence].tables
            if many is not None and span.count and (single is None or many.takes(span.count, q.shape[1], entries)):
                spans.append(many.span(span.start, span.count, tables, entries))
            elif single is not None and span.count == 1:
                singles = True
            elif span.count:
                out[span.start : span.end] = self._attend_sequence(owner, sequence, q, scale, softcap, sinks, entries, rebuild)
        if single is not None and singles:
            single.attend(q, out, self.native_spans, scale=scale, softcap=softcap, sinks=sinks)
        if many is not None and spans:
            kept = rebuild if isinstance(rebuild, KeyFromValue) else None
            many.kernel.attend(q, out, self.positions, spans, scale=scale, softcap=softcap, sinks=sinks, rebuild=kept)
        return out

    def select(self, layer: int, q: Tensor, weights: Tensor, top_k: int, scale: float) -> Tensor | None:
        owner = self.layout.owner[layer]
        kernel = self._selection(owner, q) if self.all_single else None
        if kernel is None or weights.dtype not in (torch.bfloat16, torch.float32):
            return super().select(layer, q, weights, top_k, scale)
        table, _, _ = self.cache.tables[owner, "index"]  # chosen also where all are seen: a step that is replayed does not ask
        return kernel.select_singles(q, weights, self.native_spans, table, top_k, scale)

    def _selection(self, owner: int, q: Tensor) -> RowSelection | None:
        return self.cache.native_selection.of(owner, self.arena) if q.dtype == torch.bfloat16 else None

    def _select(self, owner: int, stream: Stream, q: Tensor, weights: Tensor, top_k: int) -> Tensor:
        kernel = self._selection(owner, q)
        if kernel is None:
            return super()._select(owner, stream, q, weights, top_k)
        tables = [cache.tables[owner, stream.name] for cache in self.caches]
        spans = [SelectionSpan(span.start, span.count, table) for span, table in zip(self.spans, tables, strict=True) if span.count]
        return kernel.select(q, weights.float(), self.positions, spans, top_k)

    @property
    def native_spans(self) -> StepSpans:
        """What kernels are told of this step."""
        if self._native_spans is None:
            runs = [cache.page_runs for cache in self.caches]
            self._native_spans = StepSpans([TokenSpan(own, s.first, s.count, s.start) for own, s in zip(runs, self.spans, strict=True)])
        return self._native_spans

    def tail(self) -> Self:
        step = super().tail()
        step._native_spans = step._is_all_single = None
        return step

    @property
    def all_single(self) -> bool:
        """Whether each sequence has one query."""
        if self._is_all_single is None:
            self._is_all_single = all(span.end - span.start == 1 for span in self.spans)
        return self._is_all_single

    def _write_all(self, layer: int, stream: Stream, values: Tensor) -> None:
        if not self._native or stream.tokens_per_row != 1:
            super()._write_all(layer, stream, values)
        else:
            codec = self.cache.codecs[layer, stream.name]
            as_it_is = isinstance(codec, RawCodec) and codec.dtype == values.dtype and values.stride()[1:] == (stream.width, 1)
            rows = values if as_it_is else self.cache.encoded(layer, stream, values)
            self.native_spans.append(self.arena, *self.cache.tables[layer, stream.name], rows)

    def _write_completed(self, layer: int, stream: Stream, values: Tensor) -> None:
        if self._native:
            rows = self.cache.encoded(layer, stream, values)
            self.native_spans.append(self.arena, *self.cache.tables[layer, stream.name], rows, stream.tokens_per_row)
        else:
            super()._write_completed(layer, stream, values)

    def _write(self, layer: int, stream: Stream, sequence: int, first: int, values: Tensor) -> None:
        encoded = self.cache.encoded(layer, stream, values)
        table = self.caches[sequence].tables[layer, stream.name]
        pages = self.caches[sequence].arena.rows(encoded.shape[1])
        done = 0
        while done < len(encoded):
            page, offset = divmod(first + done, table.rows_per_page)
            count = min(table.rows_per_page - offset, len(encoded) - done)
            pages[table.pages[page - table.first_page], offset : offset + count] = encoded[done : done + count]
            done += count

    def _read(self, layer: int, stream: Stream, sequence: int, first: int, end: int) -> Tensor:
        key = (layer, stream.name, sequence)
        if key in self._gathered:
            start, rows = self._gathered[key]
            if first >= start and end <= start + len(rows):
                return rows[first - start : end - start]
        codec, row_bytes = self.cache.codecs[layer, stream.name], self.cache.row_bytes[layer, stream.name]
        arena, table = self.caches[sequence].arena, self.caches[sequence].tables[layer, stream.name]
        if end <= first:
            return codec.decode(arena.pages[0, :0].view(0, row_bytes), stream.heads, stream.width)
        low, high = first // table.rows_per_page, -(-end // table.rows_per_page)
        rows = arena.gather(table.pages[low - table.first_page : high - table.first_page], row_bytes)
        start = low * table.rows_per_page
        decoded = codec.decode(rows[first - start : end - start], stream.heads, stream.width)
        if layer in self.cache.read_again:
            self._gathered[key] = (first, decoded)
        return decoded

    def _read_rows(self, layer: int, stream: Stream, sequence: int, rows: Tensor) -> Tensor:
        table = self.caches[sequence].tables[layer, stream.name]
        pages = torch.tensor(table.pages, dtype=torch.long, device=rows.device)
        places = pages[rows // table.rows_per_page - table.first_page], rows % table.rows_per_page
        encoded = self.caches[sequence].arena.rows(self.cache.row_bytes[layer, stream.name])[places]  # [n, row_bytes]
        return self.cache.codecs[layer, stream.name].decode(encoded, stream.heads, stream.width)

    def state_in_place(self, layer: int, name: str) -> StateInPlace | None:
        if not (self._native and self.all_single) or self._is_tail:
            return None
        return StateInPlace(self.native_spans, self.arena, len(self.cache.tables), *self.cache.states[layer, name])

    def state(self, layer: int, name: str) -> Tensor:
        described, pages = state_named(self.layout.layers[layer], name), self.caches[0].arena.pages
        parts = [pages[self._state_pages[page], start:end] for page, start, end in self.cache.state_places[layer, name]]
        stored = torch.cat(parts, dim=1)  # uint8 [sequences, bytes]
        return stored.view(_STATE_DTYPES[described.dtype]).view(len(stored), *described.shape)

    def replace_state(self, layer: int, name: str, values: Tensor) -> None:
        described = state_named(self.layout.layers[layer], name)
        stored = values.to(_STATE_DTYPES[described.dtype]).flatten(1).contiguous().view(torch.uint8)  # [sequences, bytes]
        pages, done = self.caches[0].arena.pages, 0
        for page, start, end in self.cache.state_places[layer, name]:
            pages[self._state_pages[page], start:end] = stored[:, done : done + end - start]
            done += end - start

    @cached_property
    def _state_pages(self) -> Tensor:  # [state pages of a sequence, sequences], in the arena
        return torch.tensor([cache.state_pages for cache in self.caches], device=self.caches[0].arena.pages.device).t()

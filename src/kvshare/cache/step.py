"""What a forward pass sees of the cache: `Step`, and nothing else. Models take `(tokens, step)`; the tokens of all sequences lie flat.

A step's life in a model, layer by layer:

    step.append(layer, {"k": k, "v": v})       # owners only; readers have nothing to append
    if step.narrows(layer):                    # behind the last owner only some rows go on
        step = step.tail(); hidden = hidden[step.rows_kept]
    out = step.attend(layer, q, scale=...)     # over the owner's rows
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from kvshare.kernels.step_states import StateInPlace
from kvshare.layers.attention import attention
from kvshare.layers.indexer import select_rows
from kvshare.layout import CacheLayout, LayerCache, State, Stream

KeyRebuild = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""For layers that store no whole keys: rows by stream ([rows, heads, width] each), their positions [rows] -> keys [rows, heads, width]."""


@dataclass(frozen=True, slots=True)
class Span:
    """The queries of one sequence: rows `start:end` of the flat batch, at ascending positions `first ... last`."""

    start: int
    end: int
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.end - self.start

    @property
    def contiguous(self) -> bool:
        return self.last - self.first + 1 == self.count


class Step(ABC):
    """One forward pass over the new tokens of several sequences.

    `positions` [tokens] are fixed before anything is appended. `past[s]` is how many tokens sequence s had before the step,
    `spans[s]` where its new ones lie. `reader_rows` are the rows that go on behind the last owner (None: all).
    """

    def __init__(
        self,
        layout: CacheLayout,
        past: Sequence[int],
        counts: Sequence[int],
        reader_rows: Sequence[int] | None,
        device: torch.device | str = "cpu",
    ):
        self.layout = layout
        self.past = tuple(past)
        self.counts = tuple(counts)
        flat = [position for begin, count in zip(past, counts, strict=True) for position in range(begin, begin + count)]
        self.positions = torch.tensor(flat, dtype=torch.long, device=device)  # [tokens]
        starts = [0, *accumulate(self.counts)][:-1]
        self.spans = tuple(Span(a, a + n, t, t + n - 1) for a, n, t in zip(starts, self.counts, self.past, strict=True))
        if reader_rows is None or len(reader_rows) == len(flat):
            self._kept = None
        else:
            self._kept = torch.tensor(list(reader_rows), dtype=torch.long, device=device)  # [rows kept]
        self._is_tail = False
        self._masks: dict[tuple[object, ...], Tensor] = {}

    # ---- what models call

    def append(self, layer: int, rows: Mapping[str, Tensor]) -> None:
        """Write this step's rows of an owner: for each of its streams [new rows of all sequences, heads, width].

        A compressed stream gets a row for each block that these tokens complete (`new_rows`), or a row for each token, of which those
        are stored whose token completes a block. Raises `RuntimeError` for a layer that owns nothing, and behind the narrowing.
        """
        if self._is_tail or self.layout.owner[layer] != layer:
            raise RuntimeError(f"layer {layer} reads layer {self.layout.owner[layer]} and never writes")
        for stream in self.layout.layers[layer].streams:
            values = rows[stream.source]
            if stream.tokens_per_row > 1 and values.shape[0] == len(self.positions):
                self._write_completed(layer, stream, values)
                continue
            count = len(self.positions) if stream.tokens_per_row == 1 else sum(b - a for a, b in self._all_new_rows(stream))
            if count != values.shape[0]:
                raise RuntimeError(f"layer {layer} appended {values.shape[0]} rows of {stream.name!r}; this step has {count}")
            self._write_all(layer, stream, values)

    def attend(
        self,
        layer: int,
        q: Tensor,  # [tokens, query_heads, key_width]
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # [query_heads]
        entries: Tensor | None = None,  # [tokens, k] what `select` chose
        rebuild: KeyRebuild | None = None,
    ) -> Tensor:  # [tokens, query_heads, value_width]
        """Attention of the step's queries over the rows of `layer`'s owner that each may see, new ones included.

        Keys and values are the streams "k" and "v", or one stream that is both ("kv", with "entry" behind it, or "latent").
        Where whole keys are not stored, `rebuild` makes them.
        """
        owner = self.layout.owner[layer]
        outs = [
            self._attend_sequence(owner, sequence, q, scale, softcap, sinks, entries, rebuild)
            for sequence, span in enumerate(self.spans)
            if span.count
        ]
        if not outs:
            return q.new_empty(0, q.shape[1], self.layout.layers[owner].value_width)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    @torch.no_grad()  # a choice has no gradient
    def select(self, layer: int, q: Tensor, weights: Tensor, top_k: int, scale: float) -> Tensor | None:
        """The rows that an indexer lets each query attend to: int64 [tokens, top_k], ascending, -1 behind the last.

        May be None if no query sees more than `top_k`. `q` [tokens, index heads, width], `weights` [tokens, index heads], of which `scale`
        times as much counts. Keys are the owner's stream "index", where this step's are already appended.
        """
        owner = self.layout.owner[layer]
        stream = self.layout.layers[owner].stream("index")
        if all((span.last + 1) // stream.tokens_per_row <= top_k for span in self.spans):
            return None
        precise = weights.to(torch.promote_types(weights.dtype, torch.float32))
        return self._select(owner, stream, q, precise * scale, top_k)

    def _select(self, owner: int, stream: Stream, q: Tensor, weights: Tensor, top_k: int) -> Tensor:
        visible = (self.positions + 1) // stream.tokens_per_row
        chosen = []
        for sequence, span in enumerate(self.spans):
            part, keys = slice(span.start, span.end), self.rows(owner, "index", sequence)[:, 0]
            chosen.append(select_rows(q[part], weights[part], keys, visible[part], top_k))
        return torch.cat(chosen)

    def rows(self, layer: int, stream: str, sequence: int) -> Tensor:  # [rows, heads, width]
        """All live rows of one stream of `layer`'s owner, from the first that this step's queries may see."""
        owner = self.layout.owner[layer]
        described = self.layout.layers[owner].stream(stream)
        return self._read(owner, described, sequence, *self._live(described, self.past[sequence], sequence))

    def new_rows(self, stream: Stream, sequence: int) -> tuple[int, int]:
        """First and end row that the step's tokens of a sequence add to a stream."""
        past = self.past[sequence]
        return stream.num_rows(past), stream.num_rows(past + self.counts[sequence])

    def _all_new_rows(self, stream: Stream) -> list[tuple[int, int]]:
        return [self.new_rows(stream, sequence) for sequence in range(len(self.counts))]

    def state_in_place(self, layer: int, name: str) -> StateInPlace | None:
        """Where kernels change a fixed state of all sequences, in a step of one token each; None where only torch does."""
        return None

    @abstractmethod
    def state(self, layer: int, name: str) -> Tensor:
        """A fixed state before the step, of all sequences: [sequences, *shape]; zero for a sequence without a past."""

    @abstractmethod
    def replace_state(self, layer: int, name: str, values: Tensor) -> None:
        """Set a fixed state to what it is after the step: [sequences, *shape]."""

    def narrows(self, layer: int) -> bool:
        """Whether, once `layer` has appended, only some rows go on: it is the last owner and not all rows are needed."""
        return self._kept is not None and not self._is_tail and layer == self.layout.tail - 1

    @property
    def rows_kept(self) -> Tensor:  # [rows kept]
        """The rows, of the whole step, that go on behind the last owner."""
        return torch.arange(len(self.positions), device=self.positions.device) if self._kept is None else self._kept

    def tail(self) -> Self:
        """The same step on `rows_kept` only. It cannot append."""
        step = copy.copy(self)
        step.positions = self.positions[self.rows_kept]
        kept, spans, start = self.rows_kept.tolist(), [], 0
        for span in self.spans:
            places = [span.first + row - span.start for row in kept if span.start <= row < span.end]
            spans.append(Span(start, start + len(places), places[0] if places else 0, places[-1] if places else -1))
            start += len(places)
        step.spans = tuple(spans)
        step._is_tail, step._masks = True, {}
        return step

    # ---- what the two kinds of step differ in

    def _write_all(self, layer: int, stream: Stream, values: Tensor) -> None:  # [new rows of all sequences, heads, width]
        """Store the rows that the step adds to a stream."""
        start = 0
        for sequence, (first, end) in enumerate(self._all_new_rows(stream)):
            if end > first:
                self._write(layer, stream, sequence, first, values[start : start + end - first])
            start += end - first

    def _write_completed(self, layer: int, stream: Stream, values: Tensor) -> None:  # [tokens, heads, width]
        """Store the rows of those tokens that complete one."""
        self._write_all(layer, stream, values[(self.positions + 1) % stream.tokens_per_row == 0])

    @abstractmethod
    def _write(self, layer: int, stream: Stream, sequence: int, first: int, values: Tensor) -> None:
        """Store rows `first ...` of a stream: [rows, heads, width]."""

    @abstractmethod
    def _read(self, layer: int, stream: Stream, sequence: int, first: int, end: int) -> Tensor:
        """Rows `first:end` of a stream: [rows, heads, width]."""

    def _read_rows(self, layer: int, stream: Stream, sequence: int, rows: Tensor) -> Tensor:  # [n] -> [n, heads, width]
        """Some rows of a stream, in the order given."""
        return self._read(layer, stream, sequence, 0, self.new_rows(stream, sequence)[1])[rows]

    # ---- which rows a query sees

    def _live(self, stream: Stream, first_position: int, sequence: int) -> tuple[int, int]:
        """Rows that a query at `first_position` or later may see."""
        end = self.new_rows(stream, sequence)[1]
        newest = (first_position + 1) // stream.tokens_per_row
        return (0 if stream.window is None else min(end, max(0, newest - stream.window))), end

    def _attend_sequence(
        self,
        owner: int,
        sequence: int,
        q: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        entries: Tensor | None,
        rebuild: KeyRebuild | None,
    ) -> Tensor:
        """`attend` for one sequence that has queries: [its queries, query_heads, value_width]."""
        span = self.spans[sequence]
        k, v, mask, causal = self._visible(owner, sequence, span, q, entries, rebuild)
        return attention(q[span.start : span.end], k, v, mask, causal=causal, scale=scale, softcap=softcap, sinks=sinks)

    def _visible(
        self, owner: int, sequence: int, span: Span, q: Tensor, entries: Tensor | None, rebuild: KeyRebuild | None
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Keys, values and mask for the queries of one sequence."""
        layer = self.layout.layers[owner]
        limits = {}
        for stream in layer.streams:
            first, _ = self._live(stream, span.first, sequence)
            limits[stream.name] = (first, max(first, (span.last + 1) // stream.tokens_per_row - stream.behind))
        streams = _key_streams(layer)
        chosen = entries[span.start : span.end] if entries is not None and any(stream.top_k for stream in streams) else None
        if chosen is not None and span.count == 1:  # a decode step reads no more than what was selected
            rows = chosen[chosen >= 0]
            selected = {s.name: self._read_rows(owner, s, sequence, rows) for s in streams if s.top_k}
            read = {s.name: selected[s.name] if s.top_k else self._read(owner, s, sequence, *limits[s.name]) for s in streams}
            return *_keys_and_values(layer, read, limits, rebuild, q), None, False
        read = {s.name: self._read(owner, s, sequence, *limits[s.name]) for s in layer.streams if s.name != "index"}
        mask, causal = None, False
        if len(streams) == 1 and chosen is None and span.count > 1 and _is_causal(streams[0], limits[streams[0].name][0], span):
            causal = True
        elif span.count > 1:
            masks = [self._mask(stream, limits[stream.name], span, q, chosen) for stream in streams]
            mask = masks[0] if len(masks) == 1 else torch.cat(masks, dim=1)
        k, v = _keys_and_values(layer, read, limits, rebuild, q)
        return k, v, mask, causal

    def _mask(self, stream: Stream, limits: tuple[int, int], span: Span, q: Tensor, chosen: Tensor | None) -> Tensor:
        """What hides rows of a stream (`limits`: first, end) from the queries: an additive mask [queries, rows] in q's dtype."""
        first, end = limits
        key = (span, first, end, stream.tokens_per_row, stream.window, stream.behind, q.dtype)
        chosen = chosen if stream.top_k else None
        if chosen is None and key in self._masks:
            return self._masks[key]
        newest = (self.positions[span.start : span.end, None] + 1) // stream.tokens_per_row  # rows in front of this one are complete
        row = torch.arange(first, end, device=q.device)[None]
        hidden = row >= newest - stream.behind
        if stream.window is not None:
            hidden |= row < newest - stream.window
        if chosen is not None:
            keep = torch.zeros(span.count, end - first + 1, dtype=torch.bool, device=q.device)
            keep.scatter_(1, torch.where(chosen < 0, end, chosen) - first, True)
            hidden |= ~keep[:, :-1]
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
        if chosen is None:
            self._masks[key] = mask
        return mask


def _is_causal(stream: Stream, first: int, span: Span) -> bool:
    """Whether rows and queries are the same positions, so that the plain lower triangle is all that hides."""
    window = stream.window
    return stream.tokens_per_row == 1 and first == span.first and span.contiguous and (window is None or span.count <= window)


def _key_streams(layer: LayerCache) -> tuple[Stream, ...]:
    """The streams whose rows stand behind one another in the keys of a layer."""
    names = [stream.name for stream in layer.streams]
    main = "k" if "k" in names else "v" if "v" in names else None
    return tuple(s for s in layer.streams if (s.source == main if main else s.name != "index"))


def _keys_and_values(
    layer: LayerCache, read: Mapping[str, Tensor], limits: Mapping[str, tuple[int, int]], rebuild: KeyRebuild | None, q: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values from the rows of a layer's streams."""
    if "k" in read:
        keys, values = ([read[name] for name in (main, f"{main}_newest") if name in read] for main in ("k", "v"))
        return (torch.cat(keys), torch.cat(values)) if len(keys) > 1 else (keys[0], values[0])
    if "v" in read:
        if rebuild is None:
            raise RuntimeError(f"a {layer.kind} layer that stores {', '.join(read)} needs its keys rebuilt")
        return rebuild(read, torch.arange(*limits["v"], device=q.device)), read["v"]
    both = torch.cat(list(read.values())) if len(read) > 1 else next(iter(read.values()))
    return both, both


class DenseStep(Step):
    """A step without an arena, over whole sequences from their first token; autograd works.

    For scoring, training and folding, and as the test of `PagedStep`.
    """

    def __init__(
        self, layout: CacheLayout, lengths: Sequence[int], reader_rows: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ):
        super().__init__(layout, [0] * len(lengths), lengths, reader_rows, device)
        self._rows: dict[tuple[int, str, int], Tensor] = {}

    def _write(self, layer: int, stream: Stream, sequence: int, first: int, values: Tensor) -> None:
        self._rows[layer, stream.name, sequence] = values

    def _read(self, layer: int, stream: Stream, sequence: int, first: int, end: int) -> Tensor:
        values = self._rows.get((layer, stream.name, sequence))
        if values is None:  # a compressed stream whose first block is not complete
            some = next(iter(self._rows.values()))
            return some.new_empty(0, stream.heads, stream.width)
        return values[first:end]

    def state(self, layer: int, name: str) -> Tensor:
        described = state_named(self.layout.layers[layer], name)
        return torch.zeros(len(self.counts), *described.shape, device=self.positions.device)

    def replace_state(self, layer: int, name: str, values: Tensor) -> None:
        """Nothing follows this step, so nothing is kept."""


def state_named(layer: LayerCache, name: str) -> State:
    for state in layer.states:
        if state.name == name:
            return state
    raise KeyError(name)

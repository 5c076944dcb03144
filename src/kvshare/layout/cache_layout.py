"""`CacheLayout`: what every layer of a model stores, and which layer it reads. Pure arithmetic, no torch, no weights.

The planner prints it, the engine allocates exactly it, and nothing else in the code asks "is this layer shared?".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import prod

from kvshare.errors import ConfigError
from kvshare.layout.newest import with_newest
from kvshare.layout.rows import BF16_BITS, DTYPE_BYTES, NATIVE, BlockRow, Precision, precision_named

PAGE_UNIT = 4096  # pages are multiples of the operating system's page
ROWS_PER_WIDEST_PAGE = 32  # rows of the widest stream that one page holds

KINDS: tuple[str, ...] = ("full", "window", "shared", "compressed", "indexer", "state")
"""What bytes are counted as; `shared` is always 0: a reader stores nothing."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One kind of row that a layer keeps: keys, values, a latent, compressed entries, indexer keys."""

    name: str  # "k", "v", "k_rotated", "latent", "kv", "entry", "index"
    heads: int
    width: int  # numbers a head
    tokens_per_row: int = 1  # a compressed stream keeps one row for this many tokens
    window: int | None = None  # rows kept behind the newest one, itself included; None keeps all
    top_k: int | None = None  # at most this many rows are read by one query (an indexer selects them)
    native: BlockRow | None = None  # how the model's authors store a row (precision "native"), where they say
    behind: int = 0  # the newest rows, which queries read in another stream instead
    newest_of: str | None = None  # the stream whose newest rows this one keeps, in 16 bits whatever the precision

    @property
    def kind(self) -> str:
        """The entry of `KINDS` that its bytes are counted as."""
        if self.name == "index":
            return "indexer"
        if self.window is not None:
            return "window"
        return "compressed" if self.name == "entry" else "full"

    @property
    def source(self) -> str:
        """The name under which a model appends its rows."""
        return self.newest_of or self.name

    def first_row(self, num_tokens: int) -> int:
        """The oldest row that is still live after `num_tokens` tokens."""
        return 0 if self.window is None else max(0, self.num_rows(num_tokens) - self.window)

    def num_rows(self, num_tokens: int) -> int:
        """Rows ever written after `num_tokens` tokens (the live ones are `first_row` up to this)."""
        return num_tokens // self.tokens_per_row

    def live_rows(self, num_tokens: int) -> int:
        return self.num_rows(num_tokens) - self.first_row(num_tokens)

    def read_rows(self, num_tokens: int) -> int:
        """Rows that one query reads after `num_tokens` tokens."""
        seen = max(0, self.live_rows(num_tokens) - self.behind)
        return min(seen, self.top_k or seen)

    @property
    def native_bytes(self) -> int | None:
        """Bytes of a row in the authors' own form; None where they have none."""
        return None if self.native is None else self.heads * self.native.vector_bytes(self.width)

    def row_bytes(self, precision: Precision) -> int:
        if self.newest_of is not None:
            return self.heads * self.width * BF16_BITS // 8
        if precision.name == NATIVE and self.native_bytes is not None:
            return self.native_bytes
        return precision.row_bytes(self.heads, self.width)

    def holds_same_rows(self, other: Stream) -> bool:
        """Whether rows of `other` can be read as rows of this stream, whatever part of them a query selects."""
        return replace(self, top_k=None) == replace(other, top_k=None)


@dataclass(frozen=True, slots=True)
class State:
    """Numbers of fixed size that a layer keeps for a sequence: a convolution's tail, an open compression block."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPE_BYTES

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer stores. A reader has `owner` != its own index, no streams and no states.

    A layer may own some rows and read others: DeepSeek V4.1 keeps a window of its own in every layer, and reads compressed
    entries that an earlier layer wrote. What it reads so stands in `borrowed`, as (layer that stores it, stream as this layer reads it).
    """

    kind: str  # how it attends, for people: "full", "sliding", "latent", "cca", "csa", "hca", ...
    owner: int
    streams: tuple[Stream, ...] = ()
    states: tuple[State, ...] = ()
    borrowed: tuple[tuple[int, Stream], ...] = ()

    def stream(self, name: str) -> Stream:
        for stream in self.streams:
            if stream.name == name:
                return stream
        raise KeyError(name)

    @property
    def value_width(self) -> int:
        """Width of what attention sums up: the values', or the shared key-value vector's."""
        names = {stream.name: stream.width for stream in self.streams}
        return names.get("v") or names.get("kv") or names["latent"]


PrecisionChoice = str | Mapping[int, str]
"""One precision for every owner, or one by owner's layer index (owners left out use the key -1, else bf16)."""


@dataclass(frozen=True)
class CacheLayout:
    """Every layer's cache, in order.

    `bytes` is the payload (live rows and states), `held_bytes` what whole pages take, `peak_bytes` what admission must
    reserve because it lives inside a step. All three are exact: tests hold the arena to them byte for byte.
    """

    layers: tuple[LayerCache, ...]
    model_type: str = "explicit"
    max_context: int | None = None  # tokens the model was made for, where its config says so
    warnings: tuple[str, ...] = ()  # what had to be assumed
    external: bool = False  # a drafter: no layer owns rows; each reads the target's last owner of its kind (`last_owner`)

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            if not 0 <= layer.owner < len(self.layers):
                raise ConfigError("owner", f"layer {index} reads layer {layer.owner}, but there are {len(self.layers)} layers")
            if layer.owner > index:
                raise ConfigError("owner", f"layer {index} reads layer {layer.owner}, which runs after it")
            if self.layers[layer.owner].owner != layer.owner:
                raise ConfigError(
                    "owner", f"layer {index} reads layer {layer.owner}, which itself reads layer {self.layers[layer.owner].owner}"
                )
            if layer.owner != index and (layer.streams or layer.states):
                raise ConfigError("owner", f"layer {index} reads layer {layer.owner} and so can store nothing")
            for source, stream in layer.borrowed:
                if source >= index or not any(stream.holds_same_rows(stored) for stored in self.layers[source].streams):
                    raise ConfigError("borrowed", f"layer {index} reads {stream.name!r} of layer {source}, which does not store it before")

    # ---- who reads whom

    @cached_property
    def owner(self) -> tuple[int, ...]:
        """For each layer, the layer whose rows it attends to."""
        return tuple(layer.owner for layer in self.layers)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The layers that store something."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.owner == index and (layer.streams or layer.states))

    def readers(self, layer: int) -> tuple[int, ...]:
        """The layers that attend to `layer`'s rows without storing any themselves."""
        return tuple(index for index, other in enumerate(self.layers) if other.owner == layer and index != layer)

    @cached_property
    def tail(self) -> int:
        """The first of the layers behind the last owner: they own nothing and run only on rows whose logits are needed."""
        return self.owners[-1] + 1 if self.owners else 0

    def streams_of(self, layer: int) -> tuple[Stream, ...]:
        """The streams that `layer` attends to: its owner's, then those it borrows."""
        return self.layers[self.layers[layer].owner].streams + tuple(stream for _, stream in self.layers[layer].borrowed)

    def last_owner(self, kind: str) -> int:
        """The last layer of this kind that stores rows: what a drafter's layers of the kind read. Raises `KeyError` where there is none."""
        for index in reversed(self.owners):
            if self.layers[index].kind == kind:
                return index
        raise KeyError(kind)

    # ---- bytes

    def precision_of(self, layer: int, precision: PrecisionChoice = "bf16") -> Precision:
        name = precision if isinstance(precision, str) else precision.get(self.owner[layer], precision.get(-1, "bf16"))
        return precision_named(name)

    def stored_in(self, precision: PrecisionChoice) -> CacheLayout:
        """The streams that are really kept in a precision: owners whose newest rows stay in 16 bits have streams for these.

        All byte counts below are of this layout, whichever of the two is asked. Raises `ConfigError` for an owner that cannot keep them.
        """
        counts = {owner: self.precision_of(owner, precision).newest for owner in self.owners}
        if not any(counts.values()):
            return self
        layers = tuple(with_newest(layer, index, counts.get(index, 0)) for index, layer in enumerate(self.layers))
        return self if layers == self.layers else replace(self, layers=layers)

    def bytes(self, context: int, batch: int = 1, precision: PrecisionChoice = "bf16") -> int:
        """Payload after `context` tokens in each of `batch` sequences: live rows times row bytes, and states."""
        return sum(self.bytes_by_kind(context, batch, precision).values())

    def bytes_by_kind(self, context: int, batch: int = 1, precision: PrecisionChoice = "bf16") -> dict[str, int]:
        """`bytes` split over `KINDS`."""
        split, stored = dict.fromkeys(KINDS, 0), self.stored_in(precision)
        for index in self.owners:
            form = self.precision_of(index, precision)
            for stream in stored.layers[index].streams:
                split[stream.kind] += batch * stream.live_rows(context) * stream.row_bytes(form)
        split["state"] = batch * self.state_bytes
        return split

    def read_bytes(self, context: int, batch: int = 1, precision: PrecisionChoice = "bf16") -> int:
        """Bytes of cached rows that one decode step reads. Sharing does not lower it: each reader reads its owner's rows again."""
        total, stored = 0, self.stored_in(precision)
        for index in range(len(self.layers)):
            form = self.precision_of(index, precision)
            total += sum(stream.read_rows(context) * stream.row_bytes(form) for stream in stored.streams_of(index))
        return batch * total

    def bytes_per_token(self, precision: PrecisionChoice = "bf16") -> Fraction:
        """What one more token adds once every window is full."""
        stored = self.stored_in(precision)
        return sum(
            (
                Fraction(stream.row_bytes(self.precision_of(index, precision)), stream.tokens_per_row)
                for index in self.owners
                for stream in stored.layers[index].streams
                if stream.window is None
            ),
            Fraction(0),
        )

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of the fixed states of one sequence."""
        return sum(state.num_bytes for layer in self.layers for state in layer.states)

    def page_bytes(self, precision: PrecisionChoice = "bf16") -> int:
        """The arena's page: the least multiple of 4 KiB that holds 32 rows of the widest stream."""
        stored = self.stored_in(precision)
        rows = [stream.row_bytes(self.precision_of(i, precision)) for i in self.owners for stream in stored.layers[i].streams]
        return -(-max(rows, default=1) * ROWS_PER_WIDEST_PAGE // PAGE_UNIT) * PAGE_UNIT

    def rows_per_page(self, layer: int, stream: Stream, precision: PrecisionChoice = "bf16", page_bytes: int | None = None) -> int:
        """Rows of `stream` (of owner `layer`) in one page, whose size may be given by who asks often. Rows never straddle pages."""
        return (page_bytes or self.page_bytes(precision)) // stream.row_bytes(self.precision_of(layer, precision))

    def held_pages(self, context: int, precision: PrecisionChoice = "bf16") -> int:
        """Pages of one sequence between steps, after `context` tokens."""
        page_bytes, stored = self.page_bytes(precision), self.stored_in(precision)
        pages = -(-self.state_bytes // page_bytes)
        for index in self.owners:
            form = self.precision_of(index, precision)
            for stream in stored.layers[index].streams:
                rows = page_bytes // stream.row_bytes(form)
                first, end = stream.first_row(context), stream.num_rows(context)
                pages += -(-end // rows) - first // rows if end > first else 0
        return pages

    def held_bytes(self, context: int, batch: int = 1, precision: PrecisionChoice = "bf16") -> int:
        """What the arena holds between steps: whole pages from the first live row to the last, by sequence, owner and stream."""
        return batch * self.held_pages(context, precision) * self.page_bytes(precision)

    def peak_pages(self, context: int, batch: int = 1, precision: PrecisionChoice = "bf16", chunk: int = 512, draft: int = 0) -> int:
        """Pages that `batch` sequences may hold inside a step.

        The step appends `chunk` rows to one of them (or splits these over several) and `1 + draft` to each of the others.
        """
        page_bytes, stored = self.page_bytes(precision), self.stored_in(precision)
        states = -(-self.state_bytes // page_bytes)
        total = batch * states
        for index in self.owners:
            form = self.precision_of(index, precision)
            for stream in stored.layers[index].streams:
                rows, limit = page_bytes // stream.row_bytes(form), stream.num_rows(context)
                whole = -(-limit // rows)
                if stream.window is None:
                    total += batch * whole
                    continue
                prefilling = _worst_span(min(limit, stream.window + max(chunk, 1 + draft)), rows)
                decoding = _worst_span(min(limit, stream.window + 1 + draft), rows)
                # a chunk split over several sequences rounds up once more in each of them
                others = (batch - 1) * decoding + min(batch, chunk) - 1 if batch > 1 else 0
                total += min(prefilling, whole) + min(others, (batch - 1) * whole)
        return total

    def peak_bytes(self, context: int, batch: int = 1, precision: PrecisionChoice = "bf16", chunk: int = 512, draft: int = 0) -> int:
        """What admission must reserve: held bytes, plus the rows that live only inside a step (a chunk behind a window)."""
        return self.peak_pages(context, batch, precision, chunk, draft) * self.page_bytes(precision)

    def with_states_in(self, dtype: str) -> CacheLayout:
        """The same layout when the model computes in `dtype`: states that follow the model's 16-bit type become `dtype`; fp32 ones stay."""
        layers = tuple(
            replace(layer, states=tuple(replace(s, dtype=dtype) if s.dtype in ("bf16", "fp16") else s for s in layer.states))
            for layer in self.layers
        )
        return replace(self, layers=layers)

    # ---- what the same model would cost otherwise

    def without_sharing(self) -> CacheLayout:
        """The same model if every layer stored all the rows that it reads."""
        layers = tuple(
            replace(layer, owner=index, streams=self.streams_of(index), states=self.layers[layer.owner].states, borrowed=())
            for index, layer in enumerate(self.layers)
        )
        return replace(self, layers=layers)

    def without_windows(self) -> CacheLayout:
        """The same model if every window kept all rows."""
        layers = tuple(replace(layer, streams=tuple(replace(s, window=None) for s in layer.streams)) for layer in self.layers)
        return replace(self, layers=layers)


def _worst_span(rows: int, rows_per_page: int) -> int:
    """Most pages that `rows` consecutive rows can touch, whatever row they begin at."""
    return 0 if rows <= 0 else (rows + rows_per_page - 2) // rows_per_page + 1

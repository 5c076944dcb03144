"""Planned = allocated, at contexts around every boundary: windows, compression blocks, pages. No weights run here, only the bookkeeping."""

from __future__ import annotations

from collections.abc import Iterable

from kvshare.cache.arena import Arena
from kvshare.cache.tables import SequenceCache
from kvshare.doctor.report import Check
from kvshare.engine.llm import free_memory
from kvshare.layout import CacheLayout, PrecisionChoice

NAME = "planned = allocated, boundaries"
CHUNK = 512
LONGEST = 131_072
_ROOM = 0.5  # of the free memory that the arena may take, though untouched pages cost nothing


def boundaries(layout: CacheLayout, precision: PrecisionChoice, limit: int) -> list[int]:
    """Contexts at which a page, a window or a compression block fills, with those beside them; up to `limit`."""
    edges, layout = {1, limit}, layout.stored_in(precision)
    for owner in layout.owners:
        for stream in layout.layers[owner].streams:
            rows = layout.rows_per_page(owner, stream, precision)
            window = stream.window or 0
            edges |= {stream.tokens_per_row * row for row in (1, rows, 2 * rows, window, window + 1, window + rows, window + 2 * rows)}
    return sorted({edge + by for edge in edges for by in (-1, 0, 1) if 1 <= edge + by <= limit})


def boundary_check(layout: CacheLayout, precision: PrecisionChoice) -> Check:
    """Walk one sequence over all boundaries up to the model's own limit, in chunks and in single tokens, beside a second one."""
    limit = min(layout.max_context or LONGEST, LONGEST)
    room = int(free_memory() * _ROOM)
    while limit > 1 and layout.peak_bytes(limit, 2, precision, CHUNK) > room:
        limit //= 2
    contexts = boundaries(layout, precision, limit)
    arena = Arena(layout.peak_pages(limit, 2, precision, CHUNK) + 1, layout.page_bytes(precision))
    for name, walk in (("chunks", _chunks(contexts)), ("single tokens", [1] * min(contexts[-1], 4 * CHUNK))):
        problem = _walk(layout, arena, precision, walk)
        if problem:
            return Check(NAME, "", "failed", f"in {name}: {problem}")
    return Check(
        NAME,
        "",
        "passed",
        f"byte for byte at {len(contexts)} contexts from 1 to {limit:,} tokens, peaks within the plan; all pages came back",
    )


def _chunks(contexts: Iterable[int]) -> list[int]:
    """Step sizes, of `CHUNK` at most, that stop at each of the contexts."""
    sizes, done = [], 0
    for context in contexts:
        while done < context:
            sizes.append(min(CHUNK, context - done))
            done += sizes[-1]
    return sizes


def _walk(layout: CacheLayout, arena: Arena, precision: PrecisionChoice, sizes: Iterable[int]) -> str | None:
    """What went wrong when two sequences took these steps, the second a step behind; None if nothing did."""
    arena.reset_peak()
    pair = [SequenceCache(layout, arena, precision) for _ in range(2)]
    for size, late in zip(sizes, (0, *sizes), strict=False):
        for cache, count in zip(pair, (size, late), strict=True):
            if not count:
                continue
            cache.reserve(count)
            cache.commit(count)
        tokens = [cache.num_tokens for cache in pair]
        planned = sum(layout.held_bytes(count, 1, precision) for count in tokens if count)
        if arena.held_bytes != planned:
            return f"after {tokens[0]:,} and {tokens[1]:,} tokens {arena.held_bytes:,} bytes are held, planned are {planned:,}"
        reserved = layout.peak_bytes(max(tokens), 2, precision, CHUNK)
        if arena.peak_bytes > reserved:
            return f"up to {max(tokens):,} tokens {arena.peak_bytes:,} bytes were held inside a step, planned are {reserved:,}"
    for cache in pair:
        cache.release()
    if arena.num_held:
        return f"{arena.num_held} pages did not come back"
    try:
        arena.check_integrity()
    except AssertionError as error:
        return str(error)
    return None

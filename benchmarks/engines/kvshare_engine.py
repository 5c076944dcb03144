"""kvshare, through the engine that serves requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.engines import serve


def run(
    model: str, points: list[list[int]], decode: int, dtype: str, weights: str = "auto", kv_dtype: str | None = None
) -> Iterator[dict[str, Any]]:
    from kvshare import LLM
    from kvshare.benchmark.run import measure, room, warm_up

    longest = max(room(context, batch, decode, chunk=512) for context, batch in points)
    sequences = max(batch for _, batch in points)
    llm = LLM(model, dtype=dtype, weights=weights, kv_dtype=kv_dtype, max_context=longest, max_sequences=sequences, progress=False)
    warm_up(llm)
    yield {"ready": True}
    for context, batch in points:
        yield asdict(measure(llm, context, batch, decode))


if __name__ == "__main__":
    serve(run)

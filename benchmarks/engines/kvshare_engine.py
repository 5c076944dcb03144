"""kvshare, through the engine that serves requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.engines import serve
from benchmarks.engines.decodes import ATTEMPTS, decodes

if TYPE_CHECKING:
    from kvshare.kernels.quantized_weight import ActivationWidth


def run(
    model: str,
    points: list[list[int]],
    decode: int,
    dtype: str,
    weights: str = "auto",
    kv_dtype: str | None = None,
    activations: ActivationWidth = "int16",
) -> Iterator[dict[str, Any]]:
    from kvshare import LLM
    from kvshare.benchmark.run import measure, room, warm_up

    longest = max(room(context, batch, ATTEMPTS * decode, chunk=512) for context, batch in points)
    sequences = max(batch for _, batch in points)
    llm = LLM(
        model,
        dtype=dtype,
        weights=weights,
        kv_dtype=kv_dtype,
        activations=activations,
        max_context=longest,
        max_sequences=sequences,
        progress=False,
    )
    warm_up(llm)
    yield {"ready": True}
    for context, batch in points:
        around: dict[str, Any] = {}

        def timed(steps: Callable[[], float], around: dict[str, Any] = around) -> float:
            around |= decodes(steps)
            return around["decode_s"]

        yield {**asdict(measure(llm, context, batch, decode, timed=timed, attempts=ATTEMPTS)), **around}


if __name__ == "__main__":
    serve(run)

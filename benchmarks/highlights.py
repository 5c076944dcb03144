"""One table out of all comparisons: how many times as fast as each other engine kvshare reads a prompt and decodes behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvshare.benchmark.summary import summarize


def against_others(documents: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table with a row for each document, other engine, context and batch: medians of the ratios within a round.

    Like is compared with like: where an engine widens a quantized file to bf16 (transformers), kvshare's figures are those with bf16, too.
    """
    lines = ["| model | beside | prompt | reads it | decodes |", "|---|---|---|---|---|"]
    for document in documents:
        engines = document.get("engines", ())
        for other in (engine for engine in engines if not engine.startswith("kvshare")):
            first = "kvshare-bf16" if other == "transformers" and "kvshare-bf16" in engines else "kvshare"
            for each in summarize(document["rows"], first):
                if each.engine == other and each.prefill_ratio is not None and each.decode_ratio is not None:
                    prompt = f"{each.context:,} tokens" + (f" × {each.batch}" if each.batch > 1 else "")
                    lines.append(f"| {document['model']} | {other} | {prompt} | {each.prefill_ratio:.1f} × | {each.decode_ratio:.1f} × |")
    return "\n".join(lines) + "\n"

"""One table out of all comparisons: how many times as fast as each other engine kvshare reads a prompt and decodes behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvshare.benchmark.summary import Summary, summarize


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
                    lines.append(f"| {document['model']} | {other} | {prompt} | {each.prefill_ratio:.1f} × | {_decodes(each)} |")
    return "\n".join(lines) + "\n"


def _decodes(each: Summary) -> str:
    """The ratio of speeds; of speeds over the bandwidth, where the machine read at another speed for either in every round."""
    if each.marked == each.compared and each.level_ratio is not None:
        return f"{each.level_ratio:.1f} × at equal bandwidth"
    return f"{each.decode_ratio:.1f} ×"

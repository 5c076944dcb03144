"""What `benchmarks.micro --json` wrote, as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

PARTS = {
    "products": "Products of few rows, as shares of the bandwidth (times as fast as torch's bf16 product); one core's as shares of its own",
    "prefill": "Products of many rows",
    "attention": "Attention of one query, bf16",
    "encoded": "The same over encoded rows",
    "tiles": "Attention of many queries or heads, in tiles",
}


def tables(document: Mapping[str, Any]) -> str:
    """One table for each part that was measured."""
    lines = [f"**Kernels**: {document['threads']} threads of {document['processor']}, {document['isa']}"]
    for part in dict.fromkeys(each["part"] for each in document["results"]):
        rows = [each for each in document["results"] if each["part"] == part]
        reads, multiplies = (statistics.median(each[name] for each in rows) for name in ("read_gb_s", "gemm_gflop_s"))
        lines += ["", f"{PARTS.get(part, part)}; the machine reads {reads:.0f} GB/s and multiplies {multiplies:.0f} GFLOP/s:", ""]
        lines += _by_rows(rows) if part == "products" else _plain(rows)
    return "\n".join(lines)


def _plain(rows: Sequence[Row]) -> list[str]:
    kinds = {"read": "GB/s", "gemm": "GFLOP/s"}
    unit = kinds[rows[0]["limit"]]
    of = "bandwidth" if unit == "GB/s" else "GEMM peak"
    alone = any(each.get("share_alone") for each in rows)
    headings = ["kernel", "work", "ms", unit, f"of {of}", "beside", "times as fast"]
    headings += ["one core, of its bandwidth", "times as fast"] if alone else []
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for each in rows:
        speed = each["amount"] / each["seconds"] / 1e9
        figures = [f"{each['seconds'] * 1e3:.2f}", f"{speed:.0f}", f"{each['share']:.0%}", each["other"], f"{each['speedup']:.2f}"]
        if alone:
            figures += [_figure(each.get("share_alone"), "{:.0%}"), _figure(each.get("speedup_alone"), "{:.2f}")]
        lines.append(f"| {' | '.join([each['kernel'], each['work'], *figures])} |")
    return lines


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _by_rows(rows: Sequence[Row]) -> list[str]:
    """A line for each matrix and format, a column for each number of rows."""
    found = {(*each["work"].rsplit(", ", 1), each["kernel"]): each for each in rows}
    counts = list(dict.fromkeys(count for _, count, _ in found))
    headings = ["matrix", "weights", f"{counts[0]}, one core", *counts]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for matrix, kernel in dict.fromkeys((matrix, kernel) for matrix, _, kernel in found):
        cells = [found.get((matrix, count, kernel)) for count in counts]
        said = [_figure((cells[0] or {}).get("share_alone"), "{:.0%}")]
        said += ["" if each is None else f"{each['share']:.0%} ({each['speedup']:.1f})" for each in cells]
        lines.append(f"| {' | '.join([matrix, kernel, *said])} |")
    return lines

"""What `benchmarks.compare`, `.micro` and `.long_context` wrote with --json, as Markdown tables; speeds also as plots.

python -m benchmarks.report results/*.json [--plots docs/benchmarks]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import long_context
from benchmarks.micro import report as micro_report
from kvshare.benchmark.plot import save_plot
from kvshare.benchmark.profile import Part, StepProfile, profile_from
from kvshare.benchmark.summary import SAME_REGIME, Summary, decode_reads, summarize

Document = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="also draw each file's speeds into an .svg there")
    parser.add_argument("--first", metavar="ENGINE", help="take ratios to this engine instead of the first that was named")
    options = parser.parse_args()
    for file in options.files:
        document = json.loads(file.read_text())
        print(markdown(document, options.first), end="\n\n")
        if options.plots and "engines" in document:
            options.plots.mkdir(parents=True, exist_ok=True)
            save_plots(document, options.plots / f"{file.stem}.svg")


def markdown(document: Document, first: str | None = None) -> str:
    """The tables of a file, whichever of the benchmarks wrote it."""
    if "results" in document:
        return micro_report.tables(document)
    return tables(document, first) if "engines" in document else long_context.markdown(document)


def tables(document: Document, first: str | None = None) -> str:
    """A headline and one Markdown table: medians, and ratios of the first engine to each other one within a round.

    Rounds in which the machine read at another speed around the two engines' decode steps are left out of the ratio of these; where no
    round is left, they are all that it is made of, and it is marked.
    """
    first = first or document["engines"][0]
    summaries = summarize(document["rows"], first)
    parts = [f"**{document['model']}**: {_conditions(document)}", ""]
    headings = [
        "engine",
        "context",
        "batch",
        "first token s",
        "prefill tok/s",
        "of GEMM peak (least work)",
        "decode tok/s",
        "of bandwidth",
        f"{first} is faster by (prefill, decode)",
        "decode at equal bandwidth",
        "cache MB",
        "peak RSS GB",
        "anonymous GB",
    ]
    parts += [_line(headings), _line(["---"] * len(headings))]
    parts += [_line(_cells(each)) for each in summaries]
    return "\n".join(parts + _about_marks(summaries) + _profiles(document["rows"]))


def _about_marks(summaries: Sequence[Summary]) -> list[str]:
    """How many comparisons of two engines in a round were marked."""
    compared, marked = sum(each.compared for each in summaries), sum(each.marked for each in summaries)
    if not compared:
        return []
    if not marked:
        return ["", f"In all {compared} pairs of a round the machine read equally fast around both engines' decode steps."]
    return [
        "",
        f"In {marked} of {compared} pairs of a round the machine's bandwidth around the two engines' decode steps differed by more than "
        f"{SAME_REGIME - 1:.0%}. They are left out of the ratio of decode speeds (rounds in brackets); \\*: there are no others.",
    ]


def _profiles(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A second table, of the round in the middle by step: where the time of kvshare's decode steps goes."""
    groups: dict[tuple[str, int, int], list[StepProfile]] = {}
    for each in rows:
        if found := profile_from(each):
            groups.setdefault((each["engine"], each["context"], each["batch"]), []).append(found)
    if not groups:
        return []
    headings = ("a decode step of", "context", "batch", "ms", "products", "attention", "small operations", "Python and torch")
    lines = ["", _line(headings), _line(["---"] * len(headings))]
    for (engine, context, batch), found in sorted(groups.items(), key=lambda group: (group[0][2], group[0][1], group[0][0])):
        middle = sorted(found, key=lambda each: each.step_s)[len(found) // 2]
        lines.append(_line([engine, f"{context:,}", f"{batch}", f"{middle.step_s * 1e3:.1f}", *map(said, middle.parts)]))
    return lines


def said(part: Part) -> str:
    """Milliseconds, native calls, and bytes that must be read over the time."""
    calls = "" if part.calls is None else f" in {part.calls} calls"
    return f"{part.seconds * 1e3:.1f}{calls}" + (f", {part.gb_s:.0f} GB/s" if part.gb_s else "")


def save_plots(document: Document, path: Path) -> None:
    """Speed against context, of batch 1 where that was measured."""
    summaries = summarize(document["rows"], document["engines"][0])
    smallest = min((each.batch for each in summaries), default=1)
    title = f"{document['model']}, {document['machine']['processor']}, {document['threads']} threads, batch {smallest}"
    save_plot([each for each in summaries if each.batch == smallest], title, path)


def _conditions(document: Document) -> str:
    rows, machine = document["rows"], document["machine"]
    reads, multiplies = [speed for each in rows for speed in decode_reads(each)], [each["gemm_gflop_s"] for each in rows]
    rounds = len({each["round"] for each in rows})
    words = [
        f"{rounds} round{'s' if rounds > 1 else ''}",
        f"{document['threads']} threads of {machine['processor']}",
        f"reads {_span(reads)} GB/s, multiplies {_span(multiplies)} GFLOP/s",
        f"{document['started'][:16]}, {document['seconds'] / 60:.0f} min",
    ]
    return "; ".join(words)


def _span(numbers: Sequence[float]) -> str:
    if not numbers:
        return "?"
    low, high = min(numbers), max(numbers)
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f} (median {statistics.median(numbers):.0f})"


def _cells(each: Summary) -> list[str]:
    place = [each.engine, f"{each.context:,}", f"{each.batch}"]
    if each.note:
        return [*place, each.note, *[""] * 9]
    ratios = "" if each.prefill_ratio is None else f"{each.prefill_ratio:.2f}, {each.decode_ratio:.2f}{_mark(each)}"
    return [
        *place,
        _number(each.ttft_s, "{:.2f}"),
        _number(each.prefill_tok_s, "{:,.0f}"),
        "" if each.gemm_share is None else f"{each.gemm_share:.0%}" + _number(each.least_share, " ({:.0%})"),
        _number(each.decode_tok_s, "{:.2f}" if (each.decode_tok_s or 0) < 100 else "{:.0f}"),
        _number(each.read_share, "{:.0%}"),
        ratios,
        _number(each.level_ratio, "{:.2f}"),
        _number(each.held_bytes and each.held_bytes / 1e6, "{:.1f}"),
        _number(each.peak_rss_bytes and each.peak_rss_bytes / 1e9, "{:.2f}"),
        _number(each.peak_anonymous_bytes and each.peak_anonymous_bytes / 1e9, "{:.2f}"),
    ]


def _mark(each: Summary) -> str:
    if each.marked == each.compared:
        return "\\*"
    return f" ({each.compared - each.marked} of {each.compared})" if each.marked else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

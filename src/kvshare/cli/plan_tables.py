"""The tables that `kvshare plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvshare.cli.units import format_bytes, format_count
from kvshare.layout import KINDS, CacheLayout, LayerCache, Precision, PrecisionChoice, State, Stream
from kvshare.planner import ModelPlan
from kvshare.planner.engines import Deployment
from kvshare.planner.report import UNBOUNDED

_KINDS = {
    "full": "full attention",
    "sliding": "sliding window",
    "latent": "latent attention",
    "cca": "convolutional attention",
    "swa": "window only",
    "csa": "compressed, selected",
    "hca": "heavily compressed",
    "csa2": "compressed across layers",
}


def print_report(report: ModelPlan) -> None:
    """One model in full."""
    console = Console(highlight=False)
    sequences = f" in each of {report.batch} sequences" if report.batch > 1 else ""
    console.print(Text(f"{report.model.name}: {report.context:,} tokens{sequences}, {report.kv_dtype_words} cache", style="bold"))
    console.print(Text(f"config: {report.model.source}", style="dim"))
    console.print(_layer_table(report))
    console.print(_figures(report))
    _print_warnings(console, [report])


def print_comparison(reports: Sequence[ModelPlan]) -> None:
    """Several models side by side, as many in one table as the terminal is wide."""
    console = Console(highlight=False)
    first = reports[0]
    weights = f", {first.weights.precision} weights" if first.weights else ""
    console.print(Text(f"{first.kv_dtype_words} cache, batch {first.batch}{weights}", style="bold"))
    width = max(_FIGURE_WIDTH, *(len(report.model.name) for report in reports))
    abreast = max(1, (console.width - _LABEL_WIDTH) // (width + 2))
    for start in range(0, len(reports), abreast):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True, min_width=_LABEL_WIDTH - 4)
        for report in reports[start : start + abreast]:
            table.add_column(report.model.name, justify="right", width=width)
        columns = [_column(report) for report in reports[start : start + abreast]]
        for label in columns[0]:
            if any(column[label] != "-" for column in columns):
                table.add_row(label, *(column[label] for column in columns))
        console.print(table)
    _print_warnings(console, reports)


_LABEL_WIDTH = 26
_FIGURE_WIDTH = 12


def _column(report: ModelPlan) -> dict[str, str]:
    """One model's figures, by label: the same labels for every model of a comparison."""
    split, without, weights = report.kv_bytes, report.without, report.weights
    column = {"context, tokens": f"{report.context:,}", "cache": format_bytes(split["total"])}
    column |= {f"  {kind}": format_bytes(split[kind]) if split[kind] else "-" for kind in KINDS if kind != "shared"}
    column |= {
        "without sharing": format_bytes(without.sharing),
        "without windows": format_bytes(without.windows),
        "without either": format_bytes(without.both),
        "one more token": f"{_per_token(report)} B",
        "read in a decode step": format_bytes(report.read_bytes),
        "peak in a step": format_bytes(report.peak_bytes),
        "weights": format_bytes(weights.bytes if weights else None),
        "  per-layer embeddings": format_bytes(weights.per_layer_table_bytes or None if weights else None),
    }
    if report.memory is not None:
        column |= {"longest context": _count(report.max_context), "largest batch": _count(report.max_batch)}
    return column


def print_deployment(report: ModelPlan, command: Deployment) -> None:
    """A command to copy: printed plainly, whatever the width of the terminal."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"\n{report.model.name}:", style="bold"))
    if command.file is not None:
        name, text = command.file
        console.print(Text(f"cat > {name} <<'EOF'\n{text}EOF"))
    console.print(Text(command.command))
    for note in command.notes:
        console.print(Text(f"  note: {note}", style="yellow"))


def _print_warnings(console: Console, reports: Sequence[ModelPlan]) -> None:
    for report in reports:
        for warning in report.warnings:
            name = f"{report.model.name}: " if len(reports) > 1 else ""
            console.print(Text(f"note: {name}{warning}", style="yellow"))


def _layer_table(report: ModelPlan) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("layers", "")
    table.add_column("attention", "all layers")
    table.add_column("each stores", "")
    table.add_column("rows", "", justify="right")
    table.add_column("cache", format_bytes(report.kv_bytes["total"]), justify="right", no_wrap=True)
    for layer, indices in _groups(report.layout.stored_in(report.kv_dtype), report.kv_dtype):
        form = report.layout.precision_of(indices[0], report.kv_dtype)
        lines = _stored(layer, report.context, None if isinstance(report.kv_dtype, str) and not form.newest else form)
        cost = sum(stream.live_rows(report.context) * stream.row_bytes(form) for stream in layer.streams)
        cost += sum(state.num_bytes for state in layer.states)
        table.add_row(
            str(len(indices)),
            _attention(layer, indices[0]),
            "\n".join(what for what, _ in lines) or "nothing",
            "\n".join(rows for _, rows in lines),
            format_bytes(report.batch * len(indices) * cost),
        )
    return table


def _groups(layout: CacheLayout, precision: PrecisionChoice) -> list[tuple[LayerCache, list[int]]]:
    """Layers that store (in the same precision) and read alike, in the order in which they first appear."""
    groups: dict[tuple[object, ...], tuple[LayerCache, list[int]]] = {}
    for index, layer in enumerate(layout.layers):
        reads = layer.owner if layer.owner != index else None
        form = layout.precision_of(index, precision) if reads is None else None
        key = (layer.kind, reads, form, layer.streams, layer.states, layer.borrowed)
        groups.setdefault(key, (layer, []))[1].append(index)
    return list(groups.values())


def _attention(layer: LayerCache, index: int) -> str:
    words = _KINDS.get(layer.kind, layer.kind)
    if layer.owner != index:
        return f"{words}, reading layer {layer.owner}"
    sources = sorted({source for source, _ in layer.borrowed})
    return f"{words}, reading layer {', '.join(map(str, sources))}" if sources else words


def _stored(layer: LayerCache, context: int, form: Precision | None) -> list[tuple[str, str]]:
    """What a layer stores (in which precision, where that is to be said), and how many rows of it."""
    alike: dict[Stream, list[str]] = {}
    for stream in layer.streams:
        nameless = replace(stream, name="", native=None, newest_of=stream.newest_of and "")
        alike.setdefault(nameless, []).append(stream.source)
    lines = []
    for stream, names in alike.items():
        words = "" if form is None else f" ({'bf16' if stream.newest_of is not None else form.codec})"
        lines.append((f"{', '.join(names)}: {_row(stream)}{words}", f"{stream.live_rows(context):,}"))
    return lines + [(f"{state.name}: {_shape(state)} {state.dtype}", "") for state in layer.states]


def _row(stream: Stream) -> str:
    words = f"{stream.heads} x {stream.width}"
    if stream.tokens_per_row > 1:
        words += f" for {stream.tokens_per_row} tokens"
    return words if stream.window is None else f"{words}, window {stream.window:,}"


def _shape(state: State) -> str:
    return " x ".join(map(str, state.shape))


def _figures(report: ModelPlan) -> Table:
    total, without = report.kv_bytes["total"], report.without
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("what")
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("remark", style="dim")
    table.add_row("cache", format_bytes(total), f"{total:,} bytes: " + _split(report))
    table.add_row("  without sharing", format_bytes(without.sharing), _times(without.sharing, total))
    table.add_row("  without windows", format_bytes(without.windows), _times(without.windows, total))
    table.add_row("  without either", format_bytes(without.both), _times(without.both, total) + " (every layer keeps every token)")
    table.add_row("one more token", f"{_per_token(report)} B", "in each sequence, once its windows are full")
    shared = any(owner != index for index, owner in enumerate(report.layout.owner))
    table.add_row("read in a decode step", format_bytes(report.read_bytes), "readers read their owner's rows again" if shared else "")
    table.add_row(
        "held in pages",
        format_bytes(report.held_bytes),
        f"between steps, pages of {format_bytes(report.layout.page_bytes(report.kv_dtype))}",
    )
    table.add_row("peak in a step", format_bytes(report.peak_bytes), "what a server must reserve")
    if report.weights is not None:
        count = report.weights.parameters
        table.add_row(
            f"weights, {report.weights.precision}", format_bytes(report.weights.bytes), f"{format_count(count.resident)} parameters"
        )
        if count.per_layer_tables:
            remark = f"{format_count(count.per_layer_tables)} parameters that can stay on disk, not counted above"
            table.add_row("  per-layer embeddings", format_bytes(report.weights.per_layer_table_bytes), remark)
    if report.memory is not None:
        table.add_row("memory", format_bytes(report.memory), "weights and peak fit" if report.fits else "weights and peak do not fit")
        limit = " (the model's own limit)" if report.max_context == report.layout.max_context else ""
        table.add_row("  longest context", _count(report.max_context), f"tokens at batch {report.batch}{limit}")
        table.add_row("  largest batch", _count(report.max_batch), f"at {report.context:,} tokens")
    return table


def _split(report: ModelPlan) -> str:
    parts = [f"{kind} {format_bytes(count)}" for kind, count in report.kv_bytes.items() if kind != "total" and count]
    return ", ".join(parts) or "nothing stored"


def _times(count: int, total: int) -> str:
    if count == total:
        return "the same"
    return f"{count / total:.2f} times as much" if total else ""


def _per_token(report: ModelPlan) -> str:
    margin = report.bytes_per_token
    return f"{int(margin):,}" if margin.denominator == 1 else f"{float(margin):,.1f}"


def _count(number: int | None) -> str:
    if number is None:
        return "-"
    return "any" if number == UNBOUNDED else f"{number:,}"

"""Cache against context, log-log, one line a model. matplotlib is imported when a plot is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvshare.errors import RequestError
from kvshare.layout import CacheLayout
from kvshare.planner.report import ModelPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SUFFIXES = (".svg", ".png")
_FIRST_CONTEXT = 1 << 9
_POINTS_PER_OCTAVE = 16
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8c510a")  # told apart by colour-blind readers
_GREY = "#999999"
_STYLES = ("-", "--", "-.", ":")


def save_plot(reports: Sequence[ModelPlan], path: Path) -> None:
    """Writes the plot of `reports` to `path`. Raises `RequestError` for another suffix than .svg or .png, or a missing directory."""
    if path.suffix not in SUFFIXES:
        raise RequestError(f"--plot {path}: the file's name must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise RequestError(f"--plot {path}: the directory {path.parent} does not exist")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.add_subplot()
    lines = _draw(axes, reports)
    lines.sort(key=lambda line: -line[0])  # the order in which the lines end
    _label(axes)
    axes.set_title(_title(reports), loc="left")
    figure.legend([line for _, line in lines], [str(line.get_label()) for _, line in lines], loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, reports: Sequence[ModelPlan]) -> list[tuple[int, Line2D]]:
    """One line a model with a dot at the planned context; of a single model its naive cost too, and the memory where it is one for all."""
    lines: list[tuple[int, Line2D]] = []

    def draw(layout: CacheLayout, report: ModelPlan, **style: Any) -> None:
        contexts = _contexts(min(last, layout.max_context or last))
        values = [layout.bytes(tokens, report.batch, report.kv_dtype) for tokens in contexts]
        lines.append((values[-1], axes.plot(contexts, values, **style)[0]))

    last = max(max(report.context, report.layout.max_context or 0) for report in reports)
    for number, report in enumerate(reports):
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]
        draw(report.layout, report, color=colour, linestyle=style, linewidth=2, label=report.model.name)
        axes.plot([report.context], [report.kv_bytes["total"]], "o", color=colour, markersize=5)
    if len(reports) == 1:
        naive = reports[0].layout.without_sharing().without_windows()
        draw(naive, reports[0], color=_GREY, linestyle="--", linewidth=1.5, label="no sharing, no windows")
    left = {report.memory - report.weights.bytes for report in reports if report.memory is not None and report.weights is not None}
    if len(left) == 1 and (rest := left.pop()) > 0:  # of several models each would have a line of its own
        lines.append((rest, axes.axhline(rest, color=_GREY, linewidth=1, linestyle=":", label="memory beside the weights")))
    return lines


def _label(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens < 1 << 20 else f"{tokens / (1 << 20):g}M")
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count / 1e9:g} GB" if count >= 1e9 else f"{count / 1e6:g} MB"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context, tokens in each sequence")
    axes.set_ylabel("key-value cache")
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _contexts(last: int) -> list[int]:
    """Contexts from 512 tokens to `last`, evenly spaced on a logarithmic axis."""
    steps = range(_POINTS_PER_OCTAVE * last.bit_length())
    points = {round(_FIRST_CONTEXT * 2 ** (step / _POINTS_PER_OCTAVE)) for step in steps}
    return [*sorted(point for point in points if point < last), last]


def _title(reports: Sequence[ModelPlan]) -> str:
    precision = {report.kv_dtype_words for report in reports}
    batch = {report.batch for report in reports}
    words = f"Key-value cache, {' / '.join(sorted(precision))}"
    return words if batch == {1} else f"{words}, batch {', '.join(map(str, sorted(batch)))}"

"""Prefill and decode speed against context, one line an engine. matplotlib is imported when a plot is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvshare.benchmark.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8c510a")  # told apart by colour-blind readers
_STYLES = ("-", "--", ":", "-.")  # of batches


def save_plot(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Writes the plot to `path` (.svg or .png). The dotted line is what the first engine would do at the machine's measured limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    prefill, decode = figure.subplots(1, 2)
    _draw(prefill, summaries, "prefill_tok_s", "gemm_share")
    _draw(decode, summaries, "decode_tok_s", "read_share")
    prefill.set_title("prefill, tokens a second", loc="left")
    decode.set_title("decode, tokens a second", loc="left")
    handles, labels = decode.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, summaries: Sequence[Summary], speed: str, share: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    engines, batches = (list(dict.fromkeys(getattr(each, name) for each in summaries)) for name in ("engine", "batch"))
    for number, engine in enumerate(engines):
        for style, batch in zip(_STYLES * len(batches), batches, strict=False):
            own = [each for each in summaries if (each.engine, each.batch) == (engine, batch) and getattr(each, speed) is not None]
            label = engine if len(batches) == 1 else f"{engine}, batch {batch}"
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot([e.context for e in own], [getattr(e, speed) for e in own], f"o{style}", color=colour, label=label, markersize=4)
            limited = [each for each in own if getattr(each, share)]
            if not number and batch == batches[0]:
                limits = [getattr(each, speed) / getattr(each, share) for each in limited]
                axes.plot([e.context for e in limited], limits, ":", color="#999999", label=f"limit of this machine ({label})")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}k"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    axes.set_xlabel("context, tokens in each sequence")
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)

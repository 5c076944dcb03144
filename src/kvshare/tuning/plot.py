"""Divergence against the number of readers, a dot for each owner and precision. matplotlib is imported when a plot is asked for."""

from __future__ import annotations

from pathlib import Path

from kvshare.errors import RequestError
from kvshare.layout import CacheLayout
from kvshare.tuning.tune import REFERENCE, Tuning

SUFFIXES = (".svg", ".png")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers
_LEAST = 1e-9  # nats: where no divergence at all is drawn


def check_path(path: Path) -> None:
    """Raises `RequestError` for another suffix than .svg or .png, or a missing directory: before hours of measuring, not after."""
    if path.suffix not in SUFFIXES:
        raise RequestError(f"--plot {path}: the file's name must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise RequestError(f"--plot {path}: the directory {path.parent} does not exist")


def save_plot(tuning: Tuning, layout: CacheLayout, title: str, path: Path) -> None:
    """Writes the plot to `path`: squares are full layers, circles all others, numbers the owners' layers."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.add_subplot()
    names = list(next(iter(tuning.owners.values())))
    colours = dict(zip(names, _COLOURS * len(names), strict=False))
    for owner, forms in tuning.owners.items():
        readers, marker = len(layout.readers(owner)), _marker(layout, owner)
        for name, one in forms.items():
            place = readers + 0.12 * (names.index(name) - (len(names) - 1) / 2)
            height = max(one.divergence.kl, _LEAST)
            axes.plot([place], [height], marker, color=colours[name], markersize=7, alpha=0.8)
            axes.annotate(str(owner), (place, height), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center", color="#4d4d4d")
    axes.axhline(tuning.target_kl, color="#999999", linestyle=":", linewidth=1)
    axes.annotate(
        "target",
        (1, tuning.target_kl),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    axes.set_yscale("log")
    most = max(len(layout.readers(owner)) for owner in tuning.owners)
    axes.set_xticks(range(most + 1))
    axes.set_xlim(-0.5, most + 0.5)
    axes.set_xlabel("layers that read an owner's rows besides itself")
    axes.set_ylabel(f"KL from {REFERENCE}, nats a token, this owner alone encoded")
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    handles = [Line2D([], [], color=colours[name], marker="o", linestyle="", label=name) for name in names]
    kinds = {_marker(layout, owner): layout.layers[owner].kind for owner in tuning.owners}
    handles += [Line2D([], [], color="#4d4d4d", marker=marker, linestyle="", label=f"{kind} layers") for marker, kind in kinds.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def _marker(layout: CacheLayout, owner: int) -> str:
    return "s" if layout.layers[owner].kind == "full" else "o"

"""`kvshare tune`: the cheapest precision of each owner's cache that keeps a model's predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvshare.cli import options
from kvshare.cli.units import format_bytes, parse_tokens
from kvshare.errors import RequestError
from kvshare.tuning.candidates import WITH_NEWEST

if TYPE_CHECKING:
    from rich.table import Table

    from kvshare.layout import CacheLayout
    from kvshare.tuning.tune import Tuning


def tune(
    model: options.Model,
    target_kl: Annotated[float, typer.Option(help="Most divergence from a bf16 cache, in nats a token (mean KL).")] = 0.01,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="the Epistle to the Hebrews", help="The text to measure on.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to measure on.")] = 1024,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are run together; each window begins anew.")] = 512,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            show_default=f"{','.join(WITH_NEWEST)}, or without newest rows where a layer cannot keep them",
            help="Precisions to choose from beside bf16, separated by commas.",
        ),
    ] = None,
    context: Annotated[
        str, typer.Option(metavar="TOKENS", help="Where bytes are counted: long contexts favour small full layers.")
    ] = "32k",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result to this .json file, for --kv-dtype.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw divergence against readers into this .svg or .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else on stdout.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(rich_help_panel="Model", help="Computed in float32, only the cache's rounding shows; bfloat16 takes half the memory."),
    ] = "float32",
    kv_layout: options.KVLayout = "plain",
) -> None:
    """Choose the precision of each owner's cache: the fewest bytes that keep a model's predictions.

    An owner is a layer that stores rows; others may read them. Each is measured alone in each precision, by the KL divergence of the
    model's predictions from those with a bf16 cache; then assignments are tried as a whole until the cheapest within --target-kl is found.
    Fewer bytes are less memory and, in long contexts, less time to read them. Ctrl-C prints (and writes) the best found so far; the same
    command goes on from there.
    """
    content = _read(text) if text is not None else None
    if output is not None and not output.parent.is_dir():
        raise RequestError(f"--output {output}: the directory {output.parent} does not exist")
    length = parse_tokens(context)
    names = None if candidates is None else [name.strip() for name in candidates.split(",") if name.strip()]

    from kvshare import kernels
    from kvshare.checkpoints.progress import progress_bar
    from kvshare.checkpoints.resolve import locate
    from kvshare.demo import sample_text
    from kvshare.engine.llm import LLM
    from kvshare.evaluation.perplexity import text_windows
    from kvshare.tuning.journal import journal_for
    from kvshare.tuning.plot import check_path, save_plot
    from kvshare.tuning.report import to_json
    from kvshare.tuning.tune import tune as tune_model

    if plot is not None:
        check_path(plot)
    plain = "bf16" if dtype == "bfloat16" else "auto"
    files = locate(model)
    llm = LLM(files, dtype=dtype, max_context=window, max_sequences=1, weights=plain, kv_layout=kv_layout)
    windows = _first(text_windows(llm.tokenizer, content or sample_text(), window), tokens)
    journal = journal_for(files, windows, (dtype, kv_layout, kernels.isa() if kernels.available() else "torch"))
    with progress_bar("measuring", unit="forward passes") as progress:
        found = tune_model(llm.model, windows, target_kl, names, min(length, llm.layout.max_context or length), progress, journal)
    if found.interrupted:
        lost = f"What was measured could not be kept ({journal.failure})."
        again = lost if journal.failure else "The same command goes on where this one stopped."
        typer.echo(f"interrupted: this is the best that was found so far. {again}", err=True)
    else:
        journal.forget()
    result = to_json(found, llm.layout, llm.origin)
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plot is not None and found.owners:
        save_plot(found, llm.layout, f"{model}: what an owner's precision costs", plot)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    _print(found, llm.layout, model)
    for file, what in ((plot, "plot"), (output, "precisions")):
        if file is not None and (file is not plot or found.owners):
            typer.echo(f"{what} written to {file}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--text: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"--text: {path} is no UTF-8 text (byte {error.start:,})") from None


def _first(windows: list[list[int]], tokens: int) -> list[list[int]]:
    """The beginning of a text: windows of at most `tokens` tokens in all."""
    kept, left = [], tokens
    for ids in windows:
        if left > 1:
            kept.append(ids[:left])
            left -= len(kept[-1])
    return kept


def _print(tuning: Tuning, layout: CacheLayout, model: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvshare.tuning.tune import REFERENCE, SAMPLED, owner_bytes

    console = Console(highlight=False)
    tokens, names = tuning.found.divergence.tokens, list(tuning.uniform)
    console.print(Text(f"{model}: {tokens:,} tokens of text, bytes at {tuning.context:,} tokens", style="bold"))
    if not tuning.owners:
        console.print(_whole_caches(tuning))
        return
    console.print(
        Text(
            f"KL from a bf16 cache, nats a token, where one owner alone is stored in each precision (every {SAMPLED}th token):", style="dim"
        )
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("owner", "attention"):
        table.add_column(heading, no_wrap=True)
    for heading in ("readers", *names):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("chosen", no_wrap=True)
    table.add_column("saved", justify="right", no_wrap=True)
    for owner, forms in tuning.owners.items():
        costs = [_nats(forms[name].divergence.kl) for name in names]
        chosen = tuning.chosen[owner]
        size, plain = (owner_bytes(layout, owner, name, tuning.context) for name in (chosen, REFERENCE))
        cells = [str(owner), layout.layers[owner].kind, str(len(layout.readers(owner))), *costs]
        table.add_row(*cells, chosen, format_bytes(plain - size))
    console.print(table)
    console.print(_whole_caches(tuning))


def _whole_caches(tuning: Tuning) -> Table:
    """What all owners in one precision cost, and the chosen assignment below them."""
    from rich.table import Table
    from rich.text import Text

    from kvshare.tuning.tune import REFERENCE

    table = Table(box=None, pad_edge=False)
    table.add_column("all owners")
    for heading in ("cache", f"of {REFERENCE}", "KL", "worst token", "same top token"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(REFERENCE, format_bytes(tuning.reference_bytes), "100 %", "0", "0", "100 %")
    for name, one in (*tuning.uniform.items(), ("chosen", tuning.found)):
        share, same = f"{100 * one.bytes / tuning.reference_bytes:.1f} %", f"{100 * one.divergence.same_top:.1f} %"
        cells = [format_bytes(one.bytes), share, _nats(one.divergence.kl), f"{one.divergence.largest:.2g}", same]
        table.add_row(Text(name, style="bold green" if name == "chosen" else ""), *cells)
    return table


def _nats(kl: float) -> str:
    return f"{kl:.1e}"

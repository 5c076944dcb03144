"""`kvshare doctor`: prove that a model runs right here; without a model, say what is here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvshare.cli import options
from kvshare.cli.units import format_bytes
from kvshare.errors import RequestError

if TYPE_CHECKING:
    from kvshare.doctor import Check, Report
    from kvshare.doctor.examination import Notice

_MARKS = {"passed": ("✓", "green"), "failed": ("✗", "bold red"), "not compared": ("–", "yellow")}


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False, help=options.MODEL_HELP)] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="the Epistle to the Hebrews", help="The text that the model runs on.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(show_default="what crosses its windows", help="Tokens of the text to run, from 16 on.")
    ] = None,
    dtype: options.Dtype = "auto",
    kv_layout: options.KVLayout = "plain",
    weights: options.Weights = "auto",
    weight_cache: options.WeightCache = True,
    activations: options.Activations = "int16",
    kv_dtype: options.KVDtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Prove on a model, with real text, that it runs right on this machine; without a model, describe the machine.

    Runs the text in one step, in chunks, token by token, in a ragged batch, with the tail skipped, and through transformers where that
    loads the same weights. The dtype that is served is held to equal tokens or near ties; float32, where it fits the memory, to equal
    logits. Pages are hashed around every layer that must not write them, and counted against the plan after every step. Quantized weights
    (--weights), lossy caches (--kv-dtype) and rounded activations (--activations int8) are held to a divergence from plain weights, exact
    rows, and one step that does not round activations.
    Exit status: 0 all good, 1 a check failed, 2 the command is wrong.
    """
    if model is None:
        if text is not None or tokens is not None:
            raise RequestError("--text and --tokens need a model: kvshare doctor MODEL")
        _describe(as_json)
        return
    content = _read(text) if text is not None else None

    from kvshare.checkpoints.resolve import locate
    from kvshare.doctor import examine

    path = locate(model)
    with _status() as notice:
        report = examine(
            path,
            dtype=dtype,
            text=content,
            num_tokens=tokens,
            kv_layout=kv_layout,
            weights=weights,
            kv_dtype=kv_dtype,
            weight_cache=weight_cache,
            activations=activations,
            notice=notice,
        )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print(report)
    if not report.passed:
        raise typer.Exit(1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--text: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"--text: {path} is no UTF-8 text (byte {error.start:,})") from None


@contextmanager
def _status() -> Iterator[Notice]:
    """A line on a terminal's stderr that says what is being done."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        yield lambda what: status.update(Text(what, style="dim"))


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(report.origin, style="bold"), soft_wrap=True)
    perplexity = f", perplexity {report.perplexity:.4g}" if report.perplexity is not None else ""
    console.print(Text(f"{report.num_tokens:,} tokens of text{perplexity}", style="dim"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("mark")
    table.add_column("check", no_wrap=True)
    table.add_column("found")
    section = None
    for check in report.checks:
        if check.dtype != section:
            section = check.dtype
            table.add_row("", Text(section or "bookkeeping, without weights", style="bold"), "")
        mark, style = _MARKS[check.status]
        table.add_row(Text(mark, style=style), check.name, Text(check.detail))
    console.print(table)
    console.print(_verdict(report.checks))


def _verdict(checks: list[Check]) -> Any:
    from rich.text import Text

    counts = {status: sum(check.status == status for check in checks) for status in _MARKS}
    if counts["failed"]:
        return Text(f"{counts['failed']} of {len(checks)} checks failed", style="bold red")
    rest = f", {counts['not compared']} not compared" if counts["not compared"] else ""
    return Text(f"all good: {counts['passed']} checks passed{rest}", style="bold green")


def _describe(as_json: bool) -> None:
    """What is on this machine."""
    from kvshare.doctor.environment import environment

    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    kernels, threads, memory = found["kernels"], found["threads"], found["memory_bytes"]
    table.add_row("kvshare", f"{found['kvshare']} on Python {found['python']}, {found['system']}")
    table.add_row("packages", ", ".join(f"{name} {number or 'not installed'}" for name, number in found["packages"].items()))
    table.add_row("threads", f"{threads['torch']} for torch, {threads['cores']} cores")
    table.add_row("processor", f"{', '.join(found['instruction_sets']) or 'unknown instruction sets'}; torch runs {found['torch_runs']}")
    untimed = "; tested in an emulator of AMX, never timed: KVSHARE_ISA=avx512 does without" if kernels["runs"] == "amx" else ""
    table.add_row(
        "native kernels", kernels["runs"] + untimed if kernels["built"] else f"not there, plain torch runs instead: {kernels['reason']}"
    )
    table.add_row("memory", f"{format_bytes(memory['available'])} of {format_bytes(memory['total'])} available")
    table.add_row("devices", ", ".join(f"{name} {state}" for name, state in found["devices"].items()))
    for name, state in found["weights"].items():
        table.add_row(f"weights: {name}", state)
    Console(highlight=False).print(table)

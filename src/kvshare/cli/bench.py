"""`kvshare bench`: how fast a model runs on this machine, beside what the machine could do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvshare.cli import options
from kvshare.cli.units import format_bytes, parse_tokens
from kvshare.errors import RequestError

if TYPE_CHECKING:
    from kvshare.benchmark.summary import Summary


def bench(
    model: options.Model,
    context: Annotated[str, typer.Option(metavar="TOKENS", help="Lengths of the prompts, separated by commas: 512,4k.")] = "512,4k",
    batch: Annotated[str, typer.Option(metavar="COUNTS", help="Sequences side by side, separated by commas.")] = "1",
    decode: Annotated[int, typer.Option(min=1, help="Tokens decoded behind each prompt.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is measured; medians are shown.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, show_default="torch's own number", help="Threads that compute.")] = None,
    weights: options.Weights = "auto",
    activations: options.Activations = "int16",
    kv_dtype: options.KVDtype = None,
    kv_layout: options.KVLayout = "plain",
    dtype: options.Dtype = "auto",
    profile: Annotated[bool, typer.Option("--profile", help="Also show where a decode step's time goes.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw speed against context into this .svg or .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every measurement as JSON and nothing else on stdout.")] = False,
) -> None:
    """Measure how fast a model reads prompts and decodes here, and what share of this machine's limits that is.

    Prompts are random tokens. Decoding is limited by reading weights and cache from memory, reading prompts by matrix products: before each
    round the read bandwidth and the bf16 GEMM peak are measured, and shares are of that round's. Prompts count only the operations
    that their first token needs: layers behind the last owner of a cache run on one row.
    """
    contexts, batches = _numbers(context, "--context", parse_tokens), _numbers(batch, "--batch", _count)

    import torch

    from kvshare.benchmark.plot import save_plot
    from kvshare.benchmark.summary import summarize
    from kvshare.tuning.plot import check_path

    if plot is not None:
        check_path(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    loading = {"dtype": dtype, "kv_dtype": kv_dtype, "kv_layout": kv_layout, "weights": weights, "activations": activations}
    found = _measure(model, contexts, batches, decode, rounds, loading)
    summaries = summarize(found["rows"])
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found, summaries)
        if profile:
            _print_profiles(found["rows"])
    if plot is not None:
        save_plot(summaries, f"{model} on {found['processor']}, {found['threads']} threads", plot)
        typer.echo(f"plot written to {plot}", err=True)


def _measure(
    model: str, contexts: Sequence[int], batches: Sequence[int], decode: int, rounds: int, loading: dict[str, Any]
) -> dict[str, Any]:
    """Every measurement, and what it was made with."""
    import torch

    from kvshare import kernels
    from kvshare.benchmark import machine, run
    from kvshare.benchmark.summary import row
    from kvshare.benchmark.work import prompt_flops
    from kvshare.checkpoints.progress import progress_bar
    from kvshare.checkpoints.resolve import locate
    from kvshare.layout import layout_from_config
    from kvshare.layout.precision import describe_precision
    from kvshare.models import build_model
    from kvshare.planner.models import resolve

    config = resolve(str(locate(model))).config
    limit = layout_from_config(config).max_context
    longest = max(run.room(length, count, decode, chunk=512) for length in contexts for count in batches)
    if limit is not None and longest > limit:
        raise RequestError(
            f"--context {max(contexts):,} and {longest - max(contexts)} tokens behind it are more than {model} takes: {limit:,}"
        )
    llm = options.load_llm(model, max_context=str(longest), max_sequences=max(batches), **loading)
    plain = build_model(config, torch.bfloat16)
    flops = {length: prompt_flops(plain, config, length) for length in contexts}
    run.warm_up(llm)
    rows = []
    for number in range(rounds):
        speeds = machine.measure()
        with progress_bar(f"round {number + 1} of {rounds}", unit="tokens") as progress:
            measured = run.measure_all(llm, contexts, batches, decode, progress)
            rows += [row(number, "kvshare", each, speeds, flops[each.context]) for each in measured]
    return {
        "model": llm.origin,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "weights": loading["weights"],
        "activations": llm.activations,
        "kv_dtype": describe_precision(llm.engine.precision, llm.layout),
        "threads": torch.get_num_threads(),
        "kernels": kernels.isa() if kernels.available() else None,
        "processor": machine.processor_name(),
        "rows": rows,
    }


def _numbers(text: str, option: str, parse: Any) -> list[int]:
    numbers = sorted({parse(part) for part in text.split(",") if part.strip()})
    if not numbers:
        raise RequestError(f"{option} {text!r} names nothing: write it like {option} 1,8")
    return numbers


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise RequestError(f"--batch: {text!r} is no number of sequences: write it like 1,8")
    return int(text)


def _print(found: dict[str, Any], summaries: Sequence[Summary]) -> None:
    from statistics import median

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(found["model"], style="bold"), soft_wrap=True)
    runs = found["kernels"] or "no native kernels"
    console.print(
        Text(
            f"{found['dtype']}, weights {found['weights']}, {found['activations']} activations, {found['kv_dtype']} cache, "
            f"{found['threads']} threads, {runs}",
            style="dim",
        )
    )
    reads, multiplies = (median(each[name] for each in found["rows"]) for name in ("read_gb_s", "gemm_gflop_s"))
    console.print(Text(f"{found['processor']}: reads {reads:.1f} GB/s, multiplies {multiplies:,.0f} GFLOP/s in bf16", style="dim"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    headings = ("\ncontext", "\nbatch", "first\ntoken", "prefill\ntok/s", "of GEMM\npeak", "decode\ntok/s", "of band-\nwidth", "\ncache")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for each in summaries:
        cells = [f"{each.context:,}", f"{each.batch:,}", _seconds(each.ttft_s), _speed(each.prefill_tok_s), _share(each.gemm_share)]
        cells += [_speed(each.decode_tok_s), _share(each.read_share), format_bytes(each.held_bytes)]
        table.add_row(*cells)
    console.print(table)


def _print_profiles(rows: Sequence[Any]) -> None:
    """Of the last round, a line for each part of a step."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from kvshare.benchmark.profile import profile_from

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("\ncontext", "\nbatch", "\na decode step's", "\nms", "of the\nstep", "native\ncalls", "\nGB/s"):
        table.add_column(heading, justify="left" if heading.endswith("'s") else "right", no_wrap=True)
    for each in rows:
        found = profile_from(each)
        if found is None or each["round"] != rows[-1]["round"]:
            continue
        place = (f"{each['context']:,}", f"{each['batch']:,}")
        for part in found.parts:
            calls, speed = "" if part.calls is None else f"{part.calls}", f"{part.gb_s:.1f}" if part.gb_s else ""
            table.add_row(*place, part.name, f"{part.seconds * 1e3:.2f}", f"{part.seconds / found.step_s:.0%}", calls, speed)
            place = ("", "")
    Console(highlight=False).print(table)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"

"""`kvshare plan`: what a model's cache costs, before anything is allocated or downloaded but a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvshare.cli.options import KV_DTYPES
from kvshare.cli.units import parse_bytes, parse_tokens
from kvshare.errors import CapacityError, RequestError
from kvshare.planner import check_fits
from kvshare.planner import plan as plan_model
from kvshare.planner.engines import deployment
from kvshare.planner.report import DEFAULT_CHUNK

KVLayout = Literal["plain", "compact", "v-only"]
WeightDtype = Literal["bf16", "int8", "int4"]
Engine = Literal["vllm", "llama.cpp", "sglang", "tensorrt-llm"]


def plan(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A bundled name (gemma-4-E2B), a directory, a config.json, a GGUF file, or a name on the hub. Several are compared.",
        ),
    ],
    context: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", show_default="128k, or the model's limit", help="Tokens in each sequence; 128k is 131,072."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    kv_dtype: Annotated[
        str, typer.Option(metavar="NAME|FILE", help=f"Precision of the cache: {KV_DTYPES}, or a .json file that kvshare tune wrote.")
    ] = "bf16",
    kv_layout: Annotated[
        KVLayout,
        typer.Option(help="What Gemma 4's layers with keys equal to values store: both, V and the rotated part of K, or V alone."),
    ] = "plain",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for weights and cache, like 24GB (10^9 bytes) or 22GiB: prints what fits in it; exit status 1 if this does not.",
        ),
    ] = None,
    weights: Annotated[WeightDtype, typer.Option(help="Precision of the weights.")] = "bf16",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that one step computes; counts in the peak.")] = DEFAULT_CHUNK,
    engine: Annotated[
        Engine | None, typer.Option("--for", help="Print the command with which this engine serves what was planned.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw cache against context into this .svg or .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, bytes as integers, and nothing else.")] = False,
) -> None:
    """What a model's cache costs at any context, batch and precision, and what fits.

    Only a config is read: no weights, no GPU. Exit status: 0 it fits (or no memory was given), 1 it does not, 2 the command is wrong.
    """
    if as_json and engine:
        raise RequestError("--json and --for cannot be combined: --for prints a command for people")
    tokens = parse_tokens(context) if context is not None else None
    available = parse_bytes(memory) if memory is not None else None
    reports = [plan_model(model, tokens, batch, kv_dtype, kv_layout, weights, available, chunk) for model in models]
    deployments = [deployment(report, engine) for report in reports] if engine else []
    if plot is not None:
        from kvshare.planner.plot import save_plot

        save_plot(reports, plot)
    if as_json:
        typer.echo(json.dumps({"models": [report.to_json() for report in reports]}, indent=2))
    else:
        from kvshare.cli.plan_tables import print_comparison, print_deployment, print_report

        if len(reports) == 1:
            print_report(reports[0])
        else:
            print_comparison(reports)
        for report, command in zip(reports, deployments, strict=False):
            print_deployment(report, command)
        if plot is not None:
            typer.echo(f"plot written to {plot}")
    unfit = []
    for report in reports:
        try:
            check_fits(report)
        except CapacityError as error:
            unfit.append(str(error))
    if unfit:
        typer.echo("\n".join(f"kvshare: {line}" for line in unfit), err=True)
        raise typer.Exit(1)

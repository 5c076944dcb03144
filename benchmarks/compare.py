"""kvshare beside other engines on the same weights, threads and machine.

    python -m benchmarks.compare --shape gemma-4-e2b --peers transformers,llama.cpp,vllm-cpu --json results/e2b.json
    python -m benchmarks.compare --model smollm2 --engines kvshare,kvshare-bf16,transformers,llama.cpp --contexts 512

The engines run in turn, each alone in its process, for several rounds; ratios are taken within a round and their median is quoted.
Before and after each engine the machine's read bandwidth and bf16 matrix peak are measured, the bandwidth also right before and after each
engine's decode steps: these are timed until it stayed three times, and rounds in which it was another one for another engine are marked.
With --patience 120, engines wait that long at most for the bandwidth that the round's first one met.
llama.cpp is found through LLAMA_CPP_BIN (its programs) and LLAMA_CPP (its source tree, for the converter), vLLM through VLLM_PYTHON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.bandwidth import Bandwidth, Point
from benchmarks.engines import ENGINES, engine_named
from benchmarks.models import Model, prepare
from benchmarks.report import said, save_plots, tables
from benchmarks.running import run_engine
from benchmarks.shapes import SHAPES
from benchmarks.work import Work
from kvshare.benchmark.machine import ReadProbe, measure, processor_name
from kvshare.benchmark.profile import profile_from
from kvshare.benchmark.summary import unfinished
from kvshare.cli.units import parse_tokens
from kvshare.doctor.environment import environment
from kvshare.errors import KVShareError

EVERYTHING: list[Point] = [(512, 1), (4096, 1), (512, 8), (16_384, 1), (65_536, 1)]
"""Contexts and batches where none are named."""


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` also ends the engine that runs
    torch.set_num_threads(options.threads)
    engines = options.engines or ["kvshare", *options.peers]
    points = sorted(
        {*_points(options.contexts, options.batches), *options.points} or EVERYTHING, key=lambda point: (point[0] * point[1], point)
    )
    model = prepare(options.shape, options.model, options.gguf, options.where)
    work = {name: Work(model.file_for(engine_named(name))) for name in engines}
    named, begun = options.shape or options.model, time.time()
    document: dict[str, Any] = {
        "model": f"{named}, {options.gguf}" if options.gguf else named,
        "engines": engines,
        "decode": options.decode,
        "dtype": options.dtype,
        "threads": options.threads,
        "limit_s": options.limit,
        "patience_s": options.patience,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": {**environment(), "processor": processor_name()},
        "rows": [],
    }
    bandwidth = Bandwidth(ReadProbe(), options.patience)
    for number in range(options.rounds):
        for row in run_round(number, engines if number % 2 == 0 else engines[::-1], model, work, points, bandwidth, options):
            document["rows"].append(row)
            _write(document, begun, options.json)  # what is there if somebody stops it
    _write(document, begun, options.json)
    print(tables(document))
    if options.plot:
        save_plots(document, options.plot)


def run_round(
    number: int,
    engines: Sequence[str],
    model: Model,
    work: Mapping[str, Work],
    points: Sequence[Point],
    bandwidth: Bandwidth,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Every engine once over all points, each measurement as soon as it is there."""
    console, before = Console(stderr=True, highlight=False), measure()
    console.print(f"round {number + 1}: load {os.getloadavg()[0]:.2f}")
    settings = {"decode": options.decode, "dtype": options.dtype}
    bandwidth.begin_round()
    for name in engines:
        file, own, rows = model.file_for(engine_named(name)), work[name], list[dict[str, Any]]()
        for found in run_engine(name, str(file), points, settings, options.threads, options.limit, bandwidth):
            needed = own.of(found["context"], found["batch"], options.decode)
            console.print("  ", f"{name}, {found['context']:,} x {found['batch']}: {_said(found)}", markup=False, soft_wrap=True)
            rows.append({"round": number, "engine": name, **asdict(before), **needed, **found})
            yield rows[-1]
        after = measure()
        limits = asdict(before.best_of(after))
        for row in rows:  # they are in the document already
            row |= limits
        console.print(f"   reads {after.read_gb_s:.1f} GB/s, multiplies {after.gemm_gflop_s:.0f} GFLOP/s")
        before = after


def _write(document: dict[str, Any], begun: float, file: Path | None) -> None:
    document["seconds"] = time.time() - begun
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n")


def _said(row: Mapping[str, Any]) -> str:
    if "ttft_s" not in row:
        return unfinished(row)
    prefill, decode = row["context"] * row["batch"] / row["ttft_s"], row["batch"] / row["decode_s"]
    around = "-".join(f"{speed:.0f}" for speed in row.get("around_gb_s", ()))
    attempts = f", one of {len(row['decodes'])}" if len(row.get("decodes", ())) > 1 else ""
    memory = f"{row['peak_rss_bytes'] / 1e9:.2f} GB, {row['peak_anonymous_bytes'] / 1e9:.2f} anonymous"
    profile = profile_from(row)
    where = f"; step: {', '.join(f'{part.name} {said(part)}' for part in profile.parts)}" if profile else ""
    speeds = f"prefill {prefill:.0f}, decode {decode:.2f} tok/s around {around} GB/s{attempts}"
    return f"first token {row['ttft_s']:.2f} s, {speeds}, {memory}{where}"


def _points(contexts: Sequence[int], batches: Sequence[int]) -> list[Point]:
    return [(context, batch) for context in contexts for batch in batches]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=SHAPES, help="random weights in the shape of a released model")
    what.add_argument("--model", help="a directory, a GGUF file, or the name of weights in an installed package")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--peers", type=_names, default=["transformers"], help="engines beside kvshare, separated by commas")
    who.add_argument(
        "--engines", type=_names, help=f"all engines; ratios are to the first; known: {', '.join(ENGINES)}, kvshare...+kv-NAME+act-int8"
    )
    parser.add_argument("--gguf", metavar="TYPE", help="give engines that read GGUF the weights in these blocks: Q4_0, Q8_0, ...")
    parser.add_argument("--contexts", type=_tokens, default=[], help="512,4k; without it and --points: 512 to 64k, and 512x8")
    parser.add_argument("--batches", type=_tokens, default=[1], help="sequences side by side: 1,8")
    parser.add_argument("--points", type=_extra, default=[], metavar="CONTEXTxBATCH", help="points besides: 512x8,4kx8")
    parser.add_argument("--decode", type=int, default=24, help="tokens decoded behind each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=float, default=600, help="seconds that loading, and each point, may take")
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        help="seconds that an engine may wait before its decode steps until the machine reads as fast as around the round's first engine",
    )
    parser.add_argument(
        "--where", type=Path, default=Path.home() / ".cache" / "kvshare" / "benchmarks", help="where made checkpoints are kept"
    )
    parser.add_argument("--json", type=Path, help="also write every measurement to this file, for python -m benchmarks.report")
    parser.add_argument("--plot", type=Path, help="also draw speed against context into this .svg or .png")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        try:
            engine_named(name)
        except KeyError:
            raise argparse.ArgumentTypeError(f"unknown engine {name!r}: known are {', '.join(ENGINES)}") from None
    return names


def _tokens(text: str) -> list[int]:
    return [parse_tokens(part) for part in text.split(",")]


def _extra(text: str) -> list[Point]:
    pairs = [part.partition("x") for part in text.split(",")]
    return [(parse_tokens(context), parse_tokens(batch)) for context, _, batch in pairs]


if __name__ == "__main__":
    try:
        main()
    except KVShareError as error:
        sys.exit(f"benchmarks.compare: {error}")

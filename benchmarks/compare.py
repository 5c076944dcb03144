"""kvshare beside other engines on the same weights, threads and machine.

    python -m benchmarks.compare --model smollm2 --engines kvshare,kvshare-torch,transformers,llama.cpp

The engines run in turn, each alone in its process, for several rounds; ratios are taken within a round and their median is quoted.
Before each round the machine's read bandwidth and bf16 matrix peak are measured: figures from different rounds do not compare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engines import ENGINES
from benchmarks.machine import measure
from benchmarks.shapes import SHAPES, checkpoint, unpacked

TIMEOUT_SECONDS = 1800


def run_engine(engine: str, model: str, spec: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    """One engine over all contexts; the rows it finished, an `error` row if it stopped before the last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "benchmarks.engines", engine, model, json.dumps(spec)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        out, error = done.stdout, done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired as late:
        out, error = (late.stdout or b"").decode(), [f"not finished in {TIMEOUT_SECONDS} s"]
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows + [{"error": text} for text in error]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=SHAPES, help="random weights in the shape of a released model")
    what.add_argument("--model", help="a directory, a GGUF file, or the name of weights in an installed package")
    parser.add_argument(
        "--engines", default="kvshare,transformers", help=f"comma-separated, ratios are to the first; known: {', '.join(ENGINES)}"
    )
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--decode", type=int, default=24, help="tokens decoded behind each context")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--where", type=Path, default=Path.home() / ".cache" / "kvshare" / "benchmarks", help="where made checkpoints are kept"
    )
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    options = parser.parse_args()

    model, plain = prepare(options.shape, options.model, options.where)
    spec = {
        "contexts": [int(c) for c in options.contexts.split(",")],
        "decode": options.decode,
        "batch": options.batch,
        "dtype": options.dtype,
    }
    engines, rows = options.engines.split(","), []
    for number in range(options.rounds):
        rows += run_round(number, engines if number % 2 == 0 else engines[::-1], model, plain, spec, options.threads)
    if options.json:
        named = options.shape or options.model
        options.json.write_text(json.dumps({"model": named, **spec, "threads": options.threads, "rows": rows}, indent=1))
    Console().print(summary(rows, engines[0]))


def prepare(shape: str | None, model: str | None, where: Path) -> tuple[str, str]:
    """The files to load: what kvshare and llama.cpp read, and the same weights as a Hugging Face directory."""
    if shape:
        directory = str(checkpoint(shape, where))
        return directory, directory
    from kvshare.checkpoints.resolve import locate

    path = locate(model or "")
    return str(path), str(unpacked(path, where)) if path.suffix == ".gguf" else str(path)


def run_round(number: int, engines: list[str], model: str, plain: str, spec: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    console, machine, rows = Console(stderr=True), asdict(measure()), []
    speeds = f"reads {machine['read_gb_s']:.1f} GB/s, multiplies {machine['gemm_gflop_s']:.0f} GFLOP/s"
    console.print(f"round {number + 1}: {speeds}, load {os.getloadavg()[0]:.2f}")
    for engine in engines:
        for row in run_engine(engine, plain if engine == "transformers" else model, spec, threads):
            rows.append({"round": number, "engine": engine, **machine, **row})
            done = row.get("error") or f"{row['context']}: prefill {row['prefill_tok_s']:.0f}, decode {row['decode_tok_s']:.2f} tok/s"
            console.print("  ", engine, done)
    return rows


def summary(rows: list[dict[str, Any]], first: str) -> Table:
    """Medians over rounds, and the first engine's ratio to each other one within its round."""
    table = Table(title=f"medians; ratios are {first} over the other within one round (above 1: {first} is faster)")
    for column in ("engine", "context", "prefill tok/s", "decode tok/s", "prefill ratio", "decode ratio", "cache MB", "peak RSS GB"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=True)
    groups: dict[tuple[str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if "error" not in row:
            groups[row["engine"], row["context"]][row["round"]] = row
    for (engine, context), by_round in sorted(groups.items(), key=lambda item: item[0][1]):
        ours = groups.get((first, context), {})
        common = [number for number in by_round if number in ours and engine != first]

        def median(key: str, of: dict[int, dict[str, Any]] = by_round) -> float:
            return statistics.median(row[key] for row in of.values())

        def ratio(key: str, of: dict[int, dict[str, Any]] = by_round, ours: dict[int, Any] = ours, common: list[int] = common) -> str:
            return f"{statistics.median(ours[n][key] / of[n][key] for n in common):.2f}" if common else ""

        cells = [engine, f"{context:,}", f"{median('prefill_tok_s'):.0f}", f"{median('decode_tok_s'):.2f}"]
        cells += [ratio("prefill_tok_s"), ratio("decode_tok_s")]
        cells += [f"{median('cache_bytes') / 1e6:.1f}", f"{median('peak_rss_bytes') / 1e9:.2f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()

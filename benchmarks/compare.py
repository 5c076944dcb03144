"""kvshare beside other engines on the same weights, threads and machine: `python -m benchmarks.compare --model smollm2 --peers transformers`.

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
    parser.add_argument("--peers", default="transformers", help="comma-separated; known: transformers")
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--decode", type=int, default=24, help="tokens decoded behind each context")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--where", type=Path, default=Path.home() / ".cache" / "kvshare" / "benchmarks", help="where random checkpoints are kept")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    options = parser.parse_args()

    if options.shape:
        model = str(checkpoint(options.shape, options.where))
    else:
        from kvshare.checkpoints.resolve import locate

        model = str(locate(options.model))
    unpacked_model = str(unpacked(Path(model), options.where)) if model.endswith(".gguf") else model
    spec = {"contexts": [int(c) for c in options.contexts.split(",")], "decode": options.decode, "batch": options.batch, "dtype": options.dtype}
    engines = ["kvshare", *[peer for peer in options.peers.split(",") if peer]]
    console, measured = Console(stderr=True), []
    for number in range(options.rounds):
        machine = asdict(measure())
        console.print(f"round {number + 1}: reads {machine['read_gb_s']:.1f} GB/s, multiplies {machine['gemm_gflop_s']:.0f} GFLOP/s, load {os.getloadavg()[0]:.2f}")
        for engine in engines if number % 2 == 0 else reversed(engines):
            for row in run_engine(engine, model if engine == "kvshare" else unpacked_model, spec, options.threads):
                measured.append({"round": number, "engine": engine, **machine, **row})
                console.print("  ", engine, row.get("error") or f"{row['context']}: prefill {row['prefill_tok_s']:.0f}, decode {row['decode_tok_s']:.2f} tok/s")
    if options.json:
        options.json.write_text(json.dumps({"model": options.shape or options.model, **spec, "threads": options.threads, "rows": measured}, indent=1))
    Console().print(summary(measured))


def summary(rows: list[dict[str, Any]]) -> Table:
    """Medians over rounds, and kvshare's ratio to each peer within its round."""
    table = Table(title="medians; ratios are kvshare over the peer within one round (above 1: kvshare is faster)")
    for column in ("engine", "context", "prefill tok/s", "decode tok/s", "prefill ratio", "decode ratio", "cache MB", "peak RSS GB"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    groups: dict[tuple[str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if "error" not in row:
            groups[row["engine"], row["context"]][row["round"]] = row
    for (engine, context), by_round in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        ours = groups["kvshare", context]
        common = [number for number in by_round if number in ours]
        ratios = [[ours[n][key] / by_round[n][key] for n in common] for key in ("prefill_tok_s", "decode_tok_s")]
        median = {key: statistics.median(row[key] for row in by_round.values()) for key in next(iter(by_round.values())) if key.endswith(("_s", "bytes"))}
        shown = ["" if engine == "kvshare" or not ratio else f"{statistics.median(ratio):.2f}" for ratio in ratios]
        table.add_row(
            engine, f"{context:,}", f"{median['prefill_tok_s']:.0f}", f"{median['decode_tok_s']:.2f}", *shown,
            f"{median['cache_bytes'] / 1e6:.1f}", f"{median['peak_rss_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()

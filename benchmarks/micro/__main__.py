"""Each native kernel as a share of this machine's read bandwidth or bf16 GEMM peak, beside torch's own operation on the same work.

    python -m benchmarks.micro [--json micro.json] [--only encoded,tiles] [--cpu-clock]

Weights are rotated over more memory than the caches hold. Bytes are what the work must read: blocks once, keys and values once. Bandwidth
and peak are measured before each part, the bandwidth also before and after each piece of work that it limits: the higher one counts. On a
machine that others use at the same time, `--cpu-clock` runs one thread and counts its processor time alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.micro import Result, Timed
from benchmarks.micro.attention import encoded, one_query, tiles
from benchmarks.micro.products import few_rows, many_rows
from kvshare import kernels
from kvshare.benchmark.machine import measure, median_seconds, processor_name, read_speed
from kvshare.huge_pages import empty_huge

PROBED_BYTES = 256 << 20  # many times what the caches hold

PARTS: Mapping[str, Callable[[Timed], Iterator[Result]]] = {
    "products": few_rows,
    "prefill": many_rows,
    "attention": one_query,
    "encoded": encoded,
    "tiles": tiles,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--cpu-clock", action="store_true", help="one thread, in processor time")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only: there is no {', '.join(unknown)}")
    if not kernels.available():
        raise SystemExit(f"no kernels to measure: {kernels.reason_unavailable()}")
    clock = time.perf_counter
    if arguments.cpu_clock:
        torch.set_num_threads(1)
        clock = time.process_time
    print(f"{torch.get_num_threads()} threads of {processor_name()}, {kernels.isa()}")
    results, memory = [], empty_huge(PROBED_BYTES).fill_(1)
    for name in chosen:
        machine = measure(clock)
        reads = read_speed(memory, clock) / 1e9
        print(
            f"\n{name}: reads {machine.read_gb_s:.1f} GB/s, multiplies {machine.gemm_gflop_s:.0f} GFLOP/s\n"
            f"{'kernel':<8}{'work':<56}{'ms':>9}{'G/s':>8}{'share':>7}{'other':>20}{'ms':>9}{'faster':>8}"
        )
        for result in PARTS[name](partial(median_seconds, clock=clock)):
            limits = {"gemm": machine.gemm_gflop_s}
            if result.limit == "read":
                before, reads = reads, read_speed(memory, clock) / 1e9
                limits["read"] = max(before, reads)
            share = result.speed / limits[result.limit]
            measured = {"read_gb_s": limits.get("read", machine.read_gb_s), "gemm_gflop_s": machine.gemm_gflop_s}
            results.append({"part": name, **measured, **asdict(result), "share": share, "speedup": result.speedup})
            print(
                f"{result.kernel:<8}{result.work:<56}{result.seconds * 1e3:>9.3f}{result.speed:>8.1f}{share:>7.0%}"
                f"{result.other:>20}{result.other_seconds * 1e3:>9.3f}{result.speedup:>7.2f}x",
                flush=True,
            )
    if arguments.json:
        document = {"isa": kernels.isa(), "threads": torch.get_num_threads(), "processor": processor_name(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

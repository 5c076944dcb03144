"""Each native kernel as a share of this machine's read bandwidth or bf16 GEMM peak, beside torch's own operation on the same work.

    python -m benchmarks.micro [--json micro.json] [--only encoded,tiles] [--cpu-clock]

Weights and pages lie where an engine puts them, weights rotated over more memory than the caches hold. Bytes are what the work must
read: blocks once, keys and values once. The peak is measured before each part, the bandwidth before and after each piece of work that it
limits: the higher one counts. What is bound by reading is also timed on one thread, beside what one thread can read. On a machine that
others use at the same time, `--cpu-clock` runs one thread and counts its processor time alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.micro import Result, Timed, one_thread
from benchmarks.micro.attention import encoded, one_query, tiles
from benchmarks.micro.products import few_rows, many_rows
from kvshare import kernels
from kvshare.benchmark.machine import ReadProbe, measure, processor_name

PARTS: Mapping[str, Callable[[Timed], Iterator[Result]]] = {
    "products": few_rows,
    "prefill": many_rows,
    "attention": one_query,
    "encoded": encoded,
    "tiles": tiles,
}


LIMITS = {"read": "read_gb_s", "gemm": "gemm_gflop_s"}


class Around:
    """The higher of the bandwidths before and after a piece of work, of all threads and of one."""

    def __init__(self, probe: ReadProbe, clock: Callable[[], float]):
        self._probe, self._clock = probe, clock
        self._before = self._read()

    def __call__(self) -> dict[str, float]:
        before, self._before = self._before, self._read()
        return {name: max(before[name], speed) for name, speed in self._before.items()}

    def _read(self) -> dict[str, float]:
        together = self._probe(self._clock)
        with one_thread():
            return {"read_gb_s": together, "read_alone_gb_s": self._probe(self._clock)}


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
    results, probe, timed = [], ReadProbe(), Timed(clock)
    for name in chosen:
        machine, around = measure(clock), Around(probe, clock)
        print(
            f"\n{name}: reads {machine.read_gb_s:.1f} GB/s, multiplies {machine.gemm_gflop_s:.0f} GFLOP/s\n"
            f"{'kernel':<8}{'work':<56}{'ms':>9}{'G/s':>8}{'share':>7}{'alone':>7}{'other':>20}{'ms':>9}{'faster':>8}"
        )
        for result in PARTS[name](timed):
            limits = around() if result.limit == "read" else {}
            limits = {"read_gb_s": machine.read_gb_s, "gemm_gflop_s": machine.gemm_gflop_s, **limits}
            share = result.speed / limits[LIMITS[result.limit]]
            alone = result.alone_speed / limits["read_alone_gb_s"] if result.alone_speed and "read_alone_gb_s" in limits else None
            speeds = {"share": share, "speedup": result.speedup, "share_alone": alone, "speedup_alone": result.alone_speedup}
            results.append({"part": name, **limits, **asdict(result), **speeds})
            print(
                f"{result.kernel:<8}{result.work:<56}{result.seconds * 1e3:>9.3f}{result.speed:>8.1f}{share:>7.0%}"
                f"{'' if alone is None else format(alone, '.0%'):>7}"
                f"{result.other:>20}{result.other_seconds * 1e3:>9.3f}{result.speedup:>7.2f}x",
                flush=True,
            )
    if arguments.json:
        document = {"isa": kernels.isa(), "threads": torch.get_num_threads(), "processor": processor_name(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

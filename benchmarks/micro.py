"""Each native kernel as a share of this machine's read bandwidth or bf16 product, beside torch's own operation on the same work.

    python -m benchmarks.micro [--json micro.json] [--only attention] [--cpu-clock]

Weights are rotated over more memory than the caches hold. Bytes are what the work must read: blocks once, keys and values once;
of many queries, operations on the rows that they see.
On a machine that others use at the same time, `--cpu-clock` runs one thread and counts its processor time alone.
"""

from __future__ import annotations

import argparse
import json
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from kvshare import kernels
from kvshare.benchmark.machine import Machine, measure, median_seconds
from kvshare.cache.arena import Arena
from kvshare.cache.tables import PageTable
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES
from kvshare.kernels.paged_attention import PagedAttention, Query
from kvshare.kernels.quantized_weight import BLOCK_TYPES as NAMES
from kvshare.kernels.quantized_weight import QuantizedWeight
from kvshare.kernels.row_kind import RowKind
from kvshare.kernels.tile_attention import Rows, TileAttention, TileSpan
from kvshare.layers.attention import attention
from kvshare.layout import Stream

Timed = Callable[..., float]
"""Seconds that a piece of work takes: `kvshare.benchmark.machine.median_seconds` with a clock."""

ROTATED_BYTES = 400 << 20
MATRICES = ((12288, 1536), (1536, 12288))  # Gemma 4 E2B: gate and up, down
ATTENTION = {  # kv heads, query heads of each, width, rows
    "E2B full": (1, 8, 512, 131072),
    "E2B window": (1, 8, 256, 131072),
    "Llama 3 8B": (8, 4, 128, 32768),
    "SmolLM2": (3, 3, 64, 131072),
    "heads of their own": (8, 1, 128, 32768),
}
TILES = (  # name, kv heads, query heads of each, width, queries, rows, whether keys are the values
    ("SmolLM2", 3, 3, 64, 512, 4096, False),
    ("Llama 3 8B", 8, 4, 128, 512, 4096, False),
    *((f"E2B {kind}", 1, 8, width, 512, rows, False) for rows in (512, 4096, 16384) for kind, width in (("sliding", 256), ("full", 512))),
    ("DeepSeek V4", 1, 64, 512, 1, 131072, True),
)


@dataclass(frozen=True, slots=True)
class Result:
    kernel: str
    work: str
    seconds: float
    rate: float  # GB/s of what must be read, or GFLOP/s
    share: float  # of the read bandwidth or bf16 product of this run
    torch: str  # what it is compared with
    torch_seconds: float

    @property
    def speedup(self) -> float:
        return self.torch_seconds / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument("--only", choices=["products", "prefill", "attention", "tiles"], help="leave the others out")
    parser.add_argument("--cpu-clock", action="store_true", help="one thread, in processor time")
    arguments = parser.parse_args()
    if not kernels.available():
        raise SystemExit(f"no kernels to measure: {kernels.reason_unavailable()}")
    clock = time.perf_counter
    if arguments.cpu_clock:
        torch.set_num_threads(1)
        clock = time.process_time
    machine = measure(clock)
    print(
        f"{torch.get_num_threads()} threads, {kernels.isa()}, read {machine.read_gb_s:.1f} GB/s, "
        f"bf16 product {machine.gemm_gflop_s:.0f} GFLOP/s\n"
        f"{'kernel':<14}{'work':<48}{'ms':>9}{'GB or GF/s':>12}{'share':>8}{'torch':>22}{'ms':>9}{'faster':>8}"
    )
    results = []
    parts = {"products": products, "prefill": prefill, "attention": paged_attention, "tiles": tile_attention}
    for name, part in parts.items():
        for result in part(machine, partial(median_seconds, clock=clock)) if arguments.only in (None, name) else ():
            results.append({**asdict(result), "speedup": result.speedup})
            print(
                f"{result.kernel:<14}{result.work:<48}{result.seconds * 1e3:>9.3f}{result.rate:>12.1f}{result.share:>8.0%}"
                f"{result.torch:>22}{result.torch_seconds * 1e3:>9.3f}{result.speedup:>7.2f}x",
                flush=True,
            )
    after = measure(clock)
    print(f"read bandwidth afterwards: {after.read_gb_s:.1f} GB/s")
    if arguments.json:
        document = {
            "isa": kernels.isa(),
            "threads": torch.get_num_threads(),
            "before": asdict(machine),
            "after": asdict(after),
            "results": results,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def products(machine: Machine, timed: Timed) -> Iterator[Result]:
    """Few rows of activations: bound by reading the weights."""
    for out_features, in_features in MATRICES:
        dense = [torch.randn(out_features, in_features).bfloat16()]
        dense += [dense[0].clone() for _ in range(ROTATED_BYTES // dense[0].nbytes)]
        for rows in (1, 4, 16):
            x = torch.randn(rows, in_features).bfloat16()
            torch_seconds = rotated(timed, lambda weight, x=x: F.linear(x, weight), dense)
            for name in ("BF16", *NAMES):
                weights = (
                    [QuantizedWeight([weight]) for weight in dense] if name == "BF16" else random_weights(name, out_features, in_features)
                )
                out = torch.empty(rows, out_features, dtype=torch.bfloat16)
                seconds = rotated(timed, lambda weight, x=x, out=out: weight.matmul(x, out=out), weights)
                gb_s = weights[0].nbytes / seconds / 1e9
                work = f"{out_features} x {in_features}, {rows} rows"
                yield Result(name, work, seconds, gb_s, gb_s / machine.read_gb_s, "bf16 linear", torch_seconds)


def prefill(machine: Machine, timed: Timed) -> Iterator[Result]:
    """Many rows of activations: decoded a panel at a time, bound by the product."""
    for out_features, in_features in MATRICES:
        x, dense = torch.randn(512, in_features).bfloat16(), torch.randn(out_features, in_features).bfloat16()
        torch_seconds = timed(lambda x=x, dense=dense: F.linear(x, dense))
        for name in ("Q4_0", "Q4_K", "Q6_K"):
            weight = random_weights(name, out_features, in_features, 1)[0]
            seconds = timed(lambda x=x, weight=weight: weight.matmul(x))
            gb_s = weight.nbytes / seconds / 1e9
            yield Result(
                name, f"{out_features} x {in_features}, 512 rows", seconds, gb_s, gb_s / machine.read_gb_s, "bf16 linear", torch_seconds
            )


def paged_attention(machine: Machine, timed: Timed) -> Iterator[Result]:
    """One query over a long cache in pages; torch gets the same rows in one piece."""
    for name, (kv_heads, group, width, rows) in ATTENTION.items():
        arena, tables = paged_rows(kv_heads, width, rows)
        q = torch.randn(1, kv_heads * group, width).bfloat16()
        out = torch.empty_like(q)
        kernel, query = (
            PagedAttention(arena, kv_heads, (width, width), (RowKind("BF16"), RowKind("BF16")), torch.bfloat16),
            Query(0, 0, rows, *tables),
        )
        seconds = timed(partial(kernel.attend, q, out, [query], scale=0.05))
        k, v = (gathered(arena, table, rows) for table in tables)
        torch_seconds = timed(partial(attention, q, k, v, None, scale=0.05), repeats=3)
        gb_s = (k.nbytes + v.nbytes) / seconds / 1e9
        work = f"{name}: {kv_heads} x {group} heads of {width}, {rows} rows"
        yield Result("attention", work, seconds, gb_s, gb_s / machine.read_gb_s, "scaled_dot_product", torch_seconds)


def tile_attention(machine: Machine, timed: Timed) -> Iterator[Result]:
    """The newest queries of a sequence over all rows in front of them; torch gets the rows in one piece, and a mask."""
    for name, kv_heads, group, width, queries, rows, same in TILES:
        arena, (keys, values) = paged_rows(kv_heads, width, rows)
        values = keys if same else values
        q, positions = torch.randn(queries, kv_heads * group, width).bfloat16(), torch.arange(rows - queries, rows)
        out, bf16 = torch.empty_like(q), RowKind("BF16")
        kernel = TileAttention(arena, [(keys.stream, bf16, values.stream, bf16)])
        seconds = timed(partial(kernel.attend, q, out, positions, [TileSpan(0, queries, [Rows(keys, values)])], scale=0.05))
        k, v = gathered(arena, keys, rows), gathered(arena, values, rows)
        hidden = torch.arange(rows) > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill_(hidden, float("-inf")) if queries > 1 else None
        torch_seconds = timed(partial(attention, q, k, v, mask, scale=0.05), repeats=3)
        gflop_s = 4 * int((positions + 1).sum()) * kv_heads * group * width / seconds / 1e9
        work = f"{name}: {queries} of {kv_heads} x {group} x {width}, {rows} rows"
        yield Result("tiles", work, seconds, gflop_s, gflop_s / machine.gemm_gflop_s, "scaled_dot_product", torch_seconds)


def paged_rows(kv_heads: int, width: int, rows: int) -> tuple[Arena, list[PageTable]]:
    """Random keys and values of one sequence, in pages in random order."""
    row_bytes = kv_heads * width * 2
    page_bytes = -(-row_bytes * 32 // 4096) * 4096
    count = -(-rows // (page_bytes // row_bytes))
    arena = Arena(2 * count, page_bytes)
    arena.pages.view(torch.bfloat16).normal_()
    shuffled = torch.randperm(2 * count).tolist()
    halves = {"k": shuffled[:count], "v": shuffled[count:]}
    tables = [PageTable(0, Stream(name, kv_heads, width), page_bytes // row_bytes, 0, array("i", pages)) for name, pages in halves.items()]
    return arena, tables


def gathered(arena: Arena, table: PageTable, rows: int) -> torch.Tensor:  # bfloat16 [rows, kv_heads, width]
    heads, width = table.stream.heads, table.stream.width
    return arena.gather(table.pages, heads * width * 2)[:rows].view(torch.bfloat16).unflatten(-1, (heads, width))


def random_weights(name: str, out_features: int, in_features: int, count: int | None = None) -> list[QuantizedWeight]:
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    row_bytes = in_features // block.block_size * block.block_bytes
    count = count or 1 + ROTATED_BYTES // (out_features * row_bytes)
    blocks = torch.randint(0, 60, (count, out_features, row_bytes), dtype=torch.uint8)  # bytes below 60 make no infinite 16-bit floats
    return [QuantizedWeight([PackedBlocks(block, (out_features, in_features), each)]) for each in blocks]


def rotated(timed: Timed, work: Callable[[Any], object], weights: list[Any]) -> float:
    """Seconds of one call, going through all the weights."""
    return timed(lambda: [work(weight) for weight in weights], repeats=5) / len(weights)


if __name__ == "__main__":
    main()

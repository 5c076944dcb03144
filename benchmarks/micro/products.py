"""Products with weights in blocks: few rows are bound by reading the weights, many by the product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.micro import Result, Timed
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES
from kvshare.checkpoints.resident import ResidentMemory
from kvshare.kernels.quantized_weight import BLOCK_TYPES as NAMES
from kvshare.kernels.quantized_weight import QuantizedWeight

ROTATED_BYTES = 400 << 20  # more than the caches hold
MATRICES = ((12288, 1536), (1536, 12288))  # Gemma 4 E2B: gate and up, down


def few_rows(timed: Timed) -> Iterator[Result]:
    """A decode step of 1 to 16 sequences; of one also on one core."""
    for out_features, in_features in MATRICES:
        dense = dense_weights(out_features, in_features)
        inputs = {rows: torch.randn(rows, in_features).bfloat16() for rows in (1, 4, 8, 16)}
        others = {rows: rotated(timed, lambda weight, x=x: F.linear(x, weight), dense) for rows, x in inputs.items()}
        for name in ("BF16", *NAMES):
            weights = [QuantizedWeight([w]) for w in dense] if name == "BF16" else random_weights(name, out_features, in_features)
            for rows, x in inputs.items():
                out = torch.empty(rows, out_features, dtype=torch.bfloat16)

                def product(weight: QuantizedWeight, x: Tensor = x, out: Tensor = out) -> Tensor:
                    return weight.matmul(x, out=out)

                seconds, work = rotated(timed, product, weights), f"{out_features} x {in_features}, {rows} rows"
                alone = rotated(timed.alone, product, weights) if rows == 1 else None
                yield Result(name, work, seconds, weights[0].nbytes, "read", "bf16 linear", others[rows], alone)


def many_rows(timed: Timed) -> Iterator[Result]:
    """A chunk of a prompt."""
    rows = 512
    for out_features, in_features in MATRICES:
        x, dense = torch.randn(rows, in_features).bfloat16(), torch.randn(out_features, in_features).bfloat16()
        other, work = timed(lambda x=x, dense=dense: F.linear(x, dense)), 2 * rows * out_features * in_features
        for name in ("Q4_0", "Q4_K", "Q6_K", "Q8_0"):
            weight = random_weights(name, out_features, in_features, 1)[0]
            seconds = timed(lambda x=x, weight=weight: weight.matmul(x))
            yield Result(name, f"{out_features} x {in_features}, {rows} rows", seconds, work, "gemm", "bf16 linear", other)


def dense_weights(out_features: int, in_features: int) -> list[Tensor]:
    """As an engine holds them: behind one another in huge pages."""
    first, memory = torch.randn(out_features, in_features).bfloat16(), ResidentMemory(left_free=0)
    return [memory.hold(first) for _ in range(1 + ROTATED_BYTES // first.nbytes)]


def random_weights(name: str, out_features: int, in_features: int, count: int | None = None) -> list[QuantizedWeight]:
    """As an engine holds them: interleaved, behind one another in huge pages."""
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    row_bytes = in_features // block.block_size * block.block_bytes
    blocks = torch.randint(0, 60, (out_features, row_bytes), dtype=torch.uint8)  # bytes below 60 make no infinite 16-bit floats
    packed, memory = PackedBlocks(block, (out_features, in_features), blocks), ResidentMemory(left_free=0)
    return [QuantizedWeight([memory.hold_blocks(packed)]) for _ in range(count or 1 + ROTATED_BYTES // blocks.nbytes)]


def rotated(timed: Callable[..., float], work: Callable[[Any], object], weights: list[Any]) -> float:
    """Seconds of one call, going through all the weights."""
    return timed(lambda: [work(weight) for weight in weights], repeats=5) / len(weights)

"""Products with weights in blocks: few rows are bound by reading the weights, many by the product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.micro import Result, Timed
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES
from kvshare.kernels.quantized_weight import BLOCK_TYPES as NAMES
from kvshare.kernels.quantized_weight import QuantizedWeight

ROTATED_BYTES = 400 << 20  # more than the caches hold
MATRICES = ((12288, 1536), (1536, 12288))  # Gemma 4 E2B: gate and up, down


def few_rows(timed: Timed) -> Iterator[Result]:
    """A decode step of 1 to 16 sequences."""
    for out_features, in_features in MATRICES:
        dense = [torch.randn(out_features, in_features).bfloat16()]
        dense += [dense[0].clone() for _ in range(ROTATED_BYTES // dense[0].nbytes)]
        for rows in (1, 4, 8, 16):
            x = torch.randn(rows, in_features).bfloat16()
            other = rotated(timed, lambda weight, x=x: F.linear(x, weight), dense)
            for name in ("BF16", *NAMES):
                plain = name == "BF16"
                weights = [QuantizedWeight([weight]) for weight in dense] if plain else random_weights(name, out_features, in_features)
                out = torch.empty(rows, out_features, dtype=torch.bfloat16)
                seconds = rotated(timed, lambda weight, x=x, out=out: weight.matmul(x, out=out), weights)
                yield Result(name, f"{out_features} x {in_features}, {rows} rows", seconds, weights[0].nbytes, "read", "bf16 linear", other)


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


def random_weights(name: str, out_features: int, in_features: int, count: int | None = None) -> list[QuantizedWeight]:
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    row_bytes = in_features // block.block_size * block.block_bytes
    count = count or 1 + ROTATED_BYTES // (out_features * row_bytes)
    blocks = torch.randint(0, 60, (count, out_features, row_bytes), dtype=torch.uint8)  # bytes below 60 make no infinite 16-bit floats
    return [QuantizedWeight([PackedBlocks(block, (out_features, in_features), each)]) for each in blocks]


def rotated(timed: Timed, work: Callable[[Any], object], weights: list[Any]) -> float:
    """Seconds of one call, going through all the weights."""
    return timed(lambda: [work(weight) for weight in weights], repeats=5) / len(weights)

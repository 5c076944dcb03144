"""Products with weights that stay in the blocks of their file, and the same arithmetic in plain torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.huge_pages import empty_huge
from kvshare.kernels.edges import packed
from kvshare.kernels.interleaved_blocks import InterleavedBlocks
from kvshare.kernels.native import module
from kvshare.kernels.program import records

GROUP = 32  # activations that share a scale
SMALLEST = 1e-30  # a group of smaller activations counts as zeros
ROWS_IN_BLOCKS = 48  # up to so many rows are multiplied with the blocks themselves; more pay for decoding them
PANEL_BYTES = 6 << 20  # of decoded weights: in the cache when they are multiplied; for each panel the product orders the activations anew
PANEL_ROWS = 64  # that a panel has a multiple of

BLOCK_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""The formats, as `PackedBlocks.type` names them, that the kernels multiply."""

ActivationWidth = Literal["int16", "int8"]
"""The integers that activations are rounded to where they meet blocks."""

LARGEST_Q: Mapping[ActivationWidth, int] = {"int16": 127 * 256 + 127, "int8": 127}
"""The largest of each: 16 bits are two signed bytes."""


class QuantizedWeight:
    """Matrices of the same width behind one another, each in its own format: [out_features, in_features] as a whole.

    A part is `PackedBlocks`, `InterleavedBlocks` or a bfloat16 matrix [rows, in_features]. Up to `ROWS_IN_BLOCKS` rows of activations are
    rounded to `activations` with a scale for every 32 (not for bfloat16 parts) and multiplied with the blocks, which are read from memory
    once; a row's result does not depend on the rows beside it. More rows are left as they are, and the weights decoded a panel at a time.
    Raises `ValueError` for parts that do not fit together.
    """

    def __init__(self, parts: Sequence[PackedBlocks | InterleavedBlocks | Tensor], activations: ActivationWidth = "int16"):
        self.activations: ActivationWidth = activations
        self.parts = tuple(parts)  # keeps the bytes alive
        native = module()
        self.in_features = parts[0].shape[-1]
        segments = []
        for part in parts:
            data, name = (part, "BF16") if isinstance(part, Tensor) else (part.blocks, part.type.name)
            if (
                len(part.shape) != 2
                or part.shape[1] != self.in_features
                or not data.is_contiguous()
                or (name == "BF16") != (data.dtype == torch.bfloat16)
            ):
                raise ValueError(f"a part {tuple(part.shape)} of {name} in {data.dtype} does not fit rows of {self.in_features}")
            segments.append((data.data_ptr(), part.shape[0], native.BlockType[name], isinstance(part, InterleavedBlocks)))
        self.native = native.QuantizedWeight(segments, self.in_features, 1 if activations == "int8" else 2)
        self.out_features: int = self.native.out_features

    @property
    def nbytes(self) -> int:
        return self.native.bytes

    def matmul(
        self, x: Tensor, start: int = 0, end: int | None = None, out: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x Wᵀ for outputs `start:end`: [..., in_features] -> [..., end - start]; `x`, and what comes out, in float32 or bfloat16.

        `dtype` is that of the result where it is not that of `x`; `out` takes the result, and is returned.
        """
        end = self.out_features if end is None else end
        bf16 = x.dtype == torch.bfloat16
        if not (bf16 or x.dtype == torch.float32) or x.shape[-1] != self.in_features or not 0 <= start <= end <= self.out_features:
            raise ValueError(
                f"outputs {start}:{end} of a weight {[self.out_features, self.in_features]} for {x.dtype} activations {list(x.shape)}"
            )
        shape = (*x.shape[:-1], end - start)
        if out is None:
            out = torch.empty(shape, dtype=dtype or x.dtype)
        elif out.shape != shape or out.dtype != (dtype or x.dtype) or not out.is_contiguous():
            raise ValueError(f"out {list(out.shape)} in {out.dtype} for a product {list(shape)} in {dtype or x.dtype}")
        x = packed(x)
        rows = x.numel() // self.in_features
        if rows > ROWS_IN_BLOCKS:
            self._multiply_decoded(x.view(rows, -1), start, end, out.view(rows, -1))
        else:
            self.native.multiply(x.data_ptr(), bf16, out.data_ptr(), out.dtype == torch.bfloat16, rows, start, end)
        return out

    def decode(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows `start:end` as float32 or bfloat16: [end - start, in_features]."""
        rows = torch.empty(end - start, self.in_features, dtype=dtype)
        self.native.decode(start, end, rows.data_ptr(), dtype == torch.bfloat16)
        return rows

    def _multiply_decoded(self, x: Tensor, start: int, end: int, out: Tensor) -> None:  # [rows, in_features], [rows, end - start]
        step = min(end - start, max(PANEL_ROWS, PANEL_BYTES // (self.in_features * x.element_size()) // PANEL_ROWS * PANEL_ROWS))
        panel = torch.empty(step, self.in_features, dtype=x.dtype) if records() else _PANEL.room(step, self.in_features, x.dtype)
        for low in range(start, end, step):
            rows, columns = panel[: end - low], out[:, low - start : low - start + step]
            self.native.decode(low, low + len(rows), rows.data_ptr(), x.dtype == torch.bfloat16)
            if out.dtype == x.dtype and not x.requires_grad:
                torch.mm(x, rows.T, out=columns)
            else:
                columns.copy_(F.linear(x, rows))


class _Panel(threading.local):
    """Room for decoded weights, kept by each thread between products: fresh memory would cost as much as decoding into it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def room(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:  # -> [rows, width]
        size = rows * width * dtype.itemsize
        if size > len(self._memory):
            self._memory = empty_huge(max(size, PANEL_BYTES))
        return self._memory[:size].view(dtype).view(rows, width)


_PANEL = _Panel()


def round_activations(x: Tensor, to: ActivationWidth = "int16") -> Tensor:  # [..., in_features] -> float64, the same shape
    """What the kernels make of activations: integers, to nearest even, times a scale for every 32."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > SMALLEST, torch.full_like(largest, LARGEST_Q[to]) / largest, 0)
    return (torch.round(groups * inverse).double() * (largest / LARGEST_Q[to]).double()).flatten(-2)


def reference_matmul(
    parts: Sequence[PackedBlocks | Tensor], x: Tensor, activations: ActivationWidth = "int16"
) -> Tensor:  # [rows, in_features] -> float64 [rows, out_features]
    """`QuantizedWeight.matmul` of up to `ROWS_IN_BLOCKS` rows in plain torch.

    The kernels add in float32 and in another order: they differ by at most 2^-20 of the sum of |x| |w| before `out` is rounded.
    """
    outs = []
    for part in parts:
        if isinstance(part, Tensor):
            outs.append(x.double() @ part.double().T)
        else:
            outs.append(round_activations(x, activations) @ part.dequantize().double().T)
    return torch.cat(outs, dim=-1)

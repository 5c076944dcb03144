"""Weights quantized at load lose what their bits lose, in blocks that the `gguf` package reads, with kernels and without."""

from __future__ import annotations

import gguf
import pytest
import torch
from checkpoints.gguf_writing import TYPES
from torch import Tensor

from kvshare import kernels
from kvshare.checkpoints.block_encoding import block_type, encode_blocks, encode_in_torch
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.kernels.native import ISAS

FORMS = [("int8", 96, "Q8_0"), ("int4", 96, "Q4_1"), ("int4", 512, "Q4_K")]


def weight(width: int) -> Tensor:
    """Normal numbers with what real weights have too: an outlying channel, and rows of one sign, one value, tiny numbers, zeros."""
    numbers = torch.randn(70, width, generator=torch.Generator().manual_seed(0))
    numbers[:, 5] *= 6
    numbers[3] = 0
    numbers[4] = numbers[4].abs() + 1
    numbers[5] = -numbers[5].abs() - 1
    numbers[6] = 7.0
    numbers[7] *= 1e-9
    return numbers.bfloat16()


def squared_error(blocks: PackedBlocks, numbers: Tensor) -> Tensor:  # -> float64 [rows]
    return (blocks.dequantize().double() - numbers.double()).square().sum(-1)


@pytest.mark.parametrize(("precision", "width", "form"), FORMS)
def test_the_error_is_what_the_bits_allow(precision: str, width: int, form: str) -> None:
    numbers = weight(width)
    packed = encode_blocks(numbers, block_type(precision, width))
    assert packed.type.name == form
    error = squared_error(packed, numbers).sum().sqrt() / numbers.double().square().sum().sqrt()
    assert error < {"int8": 0.01, "int4": 0.075}[precision]
    assert not packed.dequantize()[3].any()
    assert (packed.dequantize()[6] - 7).abs().max() < 0.05
    assert packed.dequantize()[7].abs().max() < 1e-6
    expected = gguf.dequantize(packed.blocks.numpy(), TYPES[form])
    assert torch.equal(packed.dequantize(), torch.from_numpy(expected).view(70, width))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_the_search_beats_the_range(kind: str) -> None:
    numbers = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(numbers.numpy(), TYPES[kind]), TYPES[kind]))
    ours = squared_error(encode_blocks(numbers, block_type("int4", 512)), numbers).sum()
    assert ours < 0.9 * (theirs - numbers).square().sum(), "with 4.5 bits a number, against 4.5 and 5"


@pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.reason_unavailable()}")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("precision", "width", "form"), FORMS)
def test_native_blocks_are_as_near_as_those_of_torch(precision: str, width: int, form: str, dtype: torch.dtype, isa: str) -> None:
    numbers, kind = weight(width).to(dtype), block_type(precision, width)
    expected = encode_in_torch(numbers, kind)
    with kernels.use_isa(isa) as has:
        if not has:
            pytest.skip(f"this processor has no {isa}")
        found = encode_blocks(numbers, kind)
    assert (found.blocks != expected).float().mean() < 1e-3
    ours, theirs = squared_error(found, numbers), squared_error(PackedBlocks(kind, found.shape, expected), numbers)
    assert abs(ours.sum() / theirs.sum() - 1) < 1e-3
    assert (ours <= 1.01 * theirs + 1e-12).all()

"""Rows of a table of blocks that lie far from each other, natively as in plain torch."""

from __future__ import annotations

import pytest
import torch
from checkpoints.gguf_writing import TYPES, quantized

from kvshare import kernels
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES
from kvshare.kernels.block_rows import decode_rows
from kvshare.kernels.native import ISAS
from kvshare.kernels.quantized_weight import BLOCK_TYPES as NAMES

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.reason_unavailable()}")
WIDTH = 768


def table(name: str, width: int = WIDTH) -> PackedBlocks:
    numbers = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    data, _ = quantized(TYPES[name])(numbers.numpy())
    return PackedBlocks(next(form for form in BLOCK_TYPES.values() if form.name == name), (40, width), torch.from_numpy(data))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_columns_are_those_of_torch(name: str, isa: str) -> None:
    blocks, rows = table(name), torch.tensor([39, 0, 7, 7, 21, 3, 4, 5, 6, 30])
    with kernels.use_isa(isa) as has:
        if not has:
            pytest.skip(f"this processor has no {isa}")
        for begin, end in ((0, None), (256, 512), (512, WIDTH), (256, 256)):
            expected = blocks.rows(rows)[:, begin:end]
            torch.testing.assert_close(decode_rows(blocks, rows, torch.float32, begin, end), expected, rtol=2**-22, atol=1e-6)
            torch.testing.assert_close(decode_rows(blocks, rows, torch.bfloat16, begin, end), expected.bfloat16(), rtol=2**-7, atol=1e-6)


def test_columns_inside_a_block_come_from_torch() -> None:
    blocks, rows = table("Q4_K"), torch.tensor([2, 9])
    assert torch.equal(decode_rows(blocks, rows, torch.float32, 16, 48), blocks.rows(rows)[:, 16:48])


@pytest.mark.parametrize("row", [-1, 40])
def test_a_row_outside_the_table_is_refused(row: int) -> None:
    with pytest.raises(IndexError):
        decode_rows(table("Q4_0"), torch.tensor([0, row]), torch.float32)

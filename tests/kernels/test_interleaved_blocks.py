"""Blocks interleaved by sixteen rows give what the blocks of the file give, bit for bit, in every instruction set."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from kernels.test_quantized_weight import packed, widths

from kvshare import kernels
from kvshare.kernels.block_rows import decode_rows
from kvshare.kernels.interleaved_blocks import STRIP, interleave
from kvshare.kernels.quantized_weight import BLOCK_TYPES, LARGEST_Q, QuantizedWeight

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

ROWS = 2 * STRIP + 5  # the last ones are no whole strip
RANGES = ((0, ROWS), (0, 1), (3, 29), (15, 33), (16, 32), (31, 36), (33, ROWS))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_products_are_the_same(name: str, isa: str) -> None:
    for width in widths(name):
        part = packed(name, ROWS, width, seed=width)
        x = torch.randn(9, width, generator=torch.Generator().manual_seed(1))
        x[1] *= torch.logspace(-30, 30, width)
        for activations in LARGEST_Q:
            weight, interleaved = QuantizedWeight([part], activations), QuantizedWeight([interleave(part)], activations)
            for rows in (1, 3, 8, 9):
                for start, end in RANGES:
                    assert torch.equal(interleaved.matmul(x[:rows], start, end), weight.matmul(x[:rows], start, end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_decoded_weights_are_the_same(name: str, dtype: torch.dtype, isa: str) -> None:
    for width in widths(name)[1:4]:
        part = packed(name, ROWS, width)
        weight, interleaved = QuantizedWeight([part]), QuantizedWeight([interleave(part)])
        for start, end in RANGES:
            assert torch.equal(interleaved.decode(start, end, dtype), weight.decode(start, end, dtype))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_looked_up_are_the_same(name: str, isa: str) -> None:
    part, rows = packed(name, ROWS, 768), torch.tensor([36, 0, 15, 16, 15, 31, 32, 33, 7, 20])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for begin, end in ((0, 768), (256, 512), (512, 768), (16, 300)):
            found = decode_rows(interleave(part), rows, dtype, begin, end)
            assert torch.equal(found, decode_rows(part, rows, torch.float32 if dtype == torch.float16 else dtype, begin, end).to(dtype))


def test_orders_and_formats_lie_behind_one_another(isa: str) -> None:
    parts = [packed("Q4_K", 40, 512), packed("Q6_K", 19, 512), packed("Q8_0", 33, 512), packed("Q5_0", 48, 512)]
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    mixed = QuantizedWeight([interleave(parts[0]), parts[1], interleave(parts[2]), interleave(parts[3])])
    for start, end in ((0, 140), (0, 40), (39, 81), (58, 93), (91, 108), (139, 140), (50, 50)):
        assert torch.equal(mixed.matmul(x, start, end), QuantizedWeight(parts).matmul(x, start, end))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_bytes_are_those_of_the_file(name: str) -> None:
    part = packed(name, STRIP, 768)
    blocks = interleave(part).blocks
    assert not torch.equal(blocks, part.blocks)
    assert torch.equal(blocks.flatten().sort().values, part.blocks.flatten().sort().values)


def test_nothing_is_read_behind_the_last_strip(isa: str) -> None:
    """The last strip ends where a page of memory ends, and the next page cannot be read."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    for name in BLOCK_TYPES:
        part = packed(name, STRIP, 768)
        size = part.blocks.numel()
        room = -(-size // page) * page
        memory = mmap.mmap(-1, room + page)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + room), page, 0) == 0  # PROT_NONE
        blocks = interleave(part, whole[room - size : room])
        x = torch.randn(1, 768, generator=torch.Generator().manual_seed(1))
        assert torch.equal(QuantizedWeight([blocks]).matmul(x), QuantizedWeight([part]).matmul(x))
        assert torch.equal(decode_rows(blocks, torch.tensor([15]), torch.float32), part.rows(torch.tensor([15])))

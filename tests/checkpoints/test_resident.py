"""Weights that are copied to large pages, and mapped files that are let go of."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from kvshare import kernels
from kvshare.checkpoints.block_encoding import encode_blocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES
from kvshare.checkpoints.resident import LEAST_BYTES, ResidentMemory, forget_pages
from kvshare.huge_pages import HUGE_PAGE, empty_huge
from kvshare.kernels.interleaved_blocks import InterleavedBlocks
from kvshare.kernels.quantized_weight import QuantizedWeight


def test_a_held_tensor_is_a_copy_with_the_same_numbers() -> None:
    memory = ResidentMemory()
    tensors = [torch.randn(rows, 129).to(dtype) for rows, dtype in ((300, torch.float32), (700, torch.bfloat16), (2100, torch.float32))]
    held = [memory.hold(tensor) for tensor in tensors]
    for before, after in zip(tensors, held, strict=True):
        assert torch.equal(before, after)
        assert after.dtype == before.dtype
        assert after.data_ptr() != before.data_ptr()
        assert after.data_ptr() % 64 == 0


@pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")
def test_held_blocks_are_interleaved_and_multiply_alike() -> None:
    form = next(form for form in BLOCK_TYPES.values() if form.name == "Q8_0")
    packed = encode_blocks(torch.randn(500, 256, generator=torch.Generator().manual_seed(0)), form)
    held, x = ResidentMemory().hold_blocks(packed), torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    assert isinstance(held, InterleavedBlocks)
    assert held.blocks.nbytes == packed.blocks.nbytes
    assert torch.equal(QuantizedWeight([held]).matmul(x), QuantizedWeight([packed]).matmul(x))
    refused = ResidentMemory(left_free=1.0)
    assert refused.hold_blocks(packed) is packed
    assert refused.refused_bytes == packed.blocks.nbytes


def test_small_tensors_and_strided_ones_stay_where_they_are() -> None:
    memory = ResidentMemory()
    small, strided = torch.ones(LEAST_BYTES // 4 - 1), torch.ones(1000, 1000).T
    assert memory.hold(small) is small
    assert memory.hold(strided) is strided


def test_nothing_is_copied_where_memory_is_short() -> None:
    tensor = torch.ones(LEAST_BYTES)
    memory = ResidentMemory(left_free=1.0)
    assert memory.hold(tensor) is tensor
    assert memory.refused_bytes == tensor.nbytes


def test_large_memory_begins_at_a_huge_page_and_is_as_long_as_asked() -> None:
    memory = empty_huge(3 * HUGE_PAGE + 5)
    assert memory.data_ptr() % HUGE_PAGE == 0
    assert len(memory) == 3 * HUGE_PAGE + 5
    memory[-1] = 7
    assert memory[-1] == 7
    assert len(empty_huge(5)) == 5


def test_mapped_pages_leave_memory_and_come_back_with_the_same_bytes(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(torch.arange(1 << 23, dtype=torch.int32).numpy().tobytes())
    mapped = torch.from_file(str(file), shared=False, size=1 << 23, dtype=torch.int32)
    total = int(mapped.sum())
    before = psutil.Process().memory_info().rss
    forget_pages()
    assert psutil.Process().memory_info().rss < before - (16 << 20)
    assert int(mapped.sum()) == total


def test_what_was_written_to_a_private_mapping_is_not_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(bytes(1 << 16))
    mapped = torch.from_file(str(file), shared=False, size=1 << 16, dtype=torch.uint8)
    mapped[5] = 9
    forget_pages()
    assert mapped[5] == 9

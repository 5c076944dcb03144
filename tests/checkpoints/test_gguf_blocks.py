"""Decoded blocks equal those of the `gguf` package bit for bit, for every type and for blocks of any content."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from kvshare.checkpoints.gguf_blocks import DECODERS, PackedBlocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES, BlockType

QUANTIZED = [form for form in BLOCK_TYPES.values() if form.name in DECODERS]


def _random(form: BlockType, rows: int, blocks_per_row: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, blocks_per_row * form.block_bytes), dtype=np.uint8)


def _packed(form: BlockType, rows: int = 12, blocks_per_row: int = 3) -> PackedBlocks:
    data = torch.from_numpy(_random(form, rows, blocks_per_row))
    return PackedBlocks(form, (rows, blocks_per_row * form.block_size), data)


def test_every_type_that_loads_is_plain_or_has_a_decoder():
    assert {form.name for form in BLOCK_TYPES.values()} == {"F32", "F16", "BF16", *DECODERS}


@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.name)
def test_blocks_decode_as_the_gguf_package_decodes_them(form: BlockType):
    data = _random(form, 500, 2)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType[form.name])
    ours = PackedBlocks(form, expected.shape, torch.from_numpy(data)).dequantize().numpy()
    not_a_number = np.isnan(expected)  # random scales may be; which of the many patterns is no matter
    assert np.array_equal(np.isnan(ours), not_a_number)
    assert np.array_equal(ours.view(np.uint32)[~not_a_number], expected.view(np.uint32)[~not_a_number])


@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.name)
def test_rows_parts_and_orders_are_those_of_the_whole(form: BlockType):
    packed = _packed(form)
    whole = packed.dequantize()
    rows = torch.tensor([7, 0, 7, 11])
    torch.testing.assert_close(packed.rows(rows), whole[rows], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(packed.reordered(torch.arange(11, -1, -1)).dequantize(), whole.flip(0), rtol=0, atol=0, equal_nan=True)
    stack = PackedBlocks(form, (3, 4, whole.shape[1]), packed.blocks)
    torch.testing.assert_close(stack.part(1).dequantize(), whole[4:8], rtol=0, atol=0, equal_nan=True)


def test_a_tensor_larger_than_one_batch_of_rows_is_decoded_whole(monkeypatch: pytest.MonkeyPatch):
    packed = _packed(BLOCK_TYPES[8])
    whole = packed.dequantize(torch.bfloat16)
    monkeypatch.setattr("kvshare.checkpoints.gguf_blocks._NUMBERS_AT_ONCE", 5 * packed.shape[-1])
    torch.testing.assert_close(packed.dequantize(torch.bfloat16), whole, rtol=0, atol=0, equal_nan=True)

"""Products with GGUF's blocks equal their twin in plain torch, in every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvshare import kernels
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES
from kvshare.kernels.interleaved_blocks import interleave
from kvshare.kernels.quantized_weight import BLOCK_TYPES as NAMES
from kvshare.kernels.quantized_weight import (
    LARGEST_Q,
    ROWS_IN_BLOCKS,
    SMALLEST,
    ActivationWidth,
    QuantizedWeight,
    reference_matmul,
    round_activations,
)
from kvshare.layers.linear import Linear
from kvshare.layers.quantized_linear import QuantizedLinear

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

TYPES = {block.name: block for block in BLOCK_TYPES.values()}
SCALES_AT = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
TOLERANCE = 2.0**-20  # of the sum of |x| |w|
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17)  # rows of activations: kernels take up to eight at a time


def packed(name: str, rows: int, width: int, seed: int = 0) -> PackedBlocks:
    """Random bits in every field but the 16-bit floats, which are random numbers of both signs, some zero."""
    generator = torch.Generator().manual_seed(seed)
    block = TYPES[name]
    blocks = torch.randint(0, 256, (rows * width // block.block_size, block.block_bytes), dtype=torch.uint8, generator=generator)
    for at in SCALES_AT[name]:
        numbers = torch.randn(len(blocks), 1, generator=generator) * 0.01
        numbers[::7] = 0
        blocks[:, at : at + 2] = numbers.half().view(torch.uint8)
    return PackedBlocks(block, (rows, width), blocks.reshape(rows, -1))


def widths(name: str) -> tuple[int, ...]:
    """Odd numbers of blocks, and more than the kernels take in one go."""
    return (256, 768, 2304) if name.endswith("K") else (32, 96, 576, 1056, 17 * 1024 + 32)


def assert_equals_twin(
    out: Tensor,
    parts: list[PackedBlocks | Tensor],
    x: Tensor,
    start: int = 0,
    end: int | None = None,
    activations: ActivationWidth = "int16",
) -> None:
    expected = reference_matmul(parts, x, activations)[:, start:end]
    size = torch.cat(
        [(x.double() if isinstance(p, Tensor) else round_activations(x, activations)).abs() @ summands(p).T for p in parts], dim=1
    )
    bound = TOLERANCE * size[:, start:end] + (2.0**-8 * expected.abs() if out.dtype == torch.bfloat16 else 0) + 1e-30
    assert ((out.double() - expected).abs() <= bound).all()


def summands(part: PackedBlocks | Tensor) -> Tensor:
    """The size of what is added up for each weight: a product and a minimum are each about as large as their group's largest weight."""
    weights = dense(part).abs()
    if isinstance(part, Tensor) or part.type.name not in ("Q4_1", "Q4_K", "Q5_K"):
        return weights
    groups = weights.unflatten(-1, (-1, 32))
    return (weights + 2 * groups.amax(-1, keepdim=True).expand_as(groups).flatten(1)) / 2


def dense(part: PackedBlocks | Tensor) -> Tensor:
    return part.double() if isinstance(part, Tensor) else part.dequantize().double()


@pytest.mark.parametrize("activations", LARGEST_Q)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_product_equals_twin(name: str, dtype: torch.dtype, activations: ActivationWidth, isa: str) -> None:
    for width in widths(name):
        part = packed(name, 37, width, seed=width)
        weight = QuantizedWeight([part], activations)
        x = torch.randn(max(COUNTS), width, generator=torch.Generator().manual_seed(1))
        x[0, :32] = 0  # a group without a scale
        x[1] *= torch.logspace(-30, 30, width)
        x[2:, ::97] *= 1000  # outliers, beside which the others keep few of their bits
        x = x.to(dtype)
        together = weight.matmul(x)
        assert_equals_twin(together, [part], x, activations=activations)
        for rows in COUNTS:
            assert torch.equal(weight.matmul(x[-rows:]), together[-rows:])  # whatever rows are beside it
        assert_equals_twin(weight.matmul(x, dtype=torch.float32), [part], x, activations=activations)


@pytest.mark.parametrize("width", [32, 96, 1536, 2080 + 3, 12288 + 32])  # with many rows, wide ones are multiplied a block at a time
def test_bfloat16_product_is_that_of_float64(width: int, isa: str) -> None:
    part = torch.randn(37, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    weight = QuantizedWeight([part])
    x = torch.randn(max(COUNTS), width, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[1] *= torch.logspace(-15, 15, width)
    together = weight.matmul(x, dtype=torch.float32)
    assert_equals_twin(together, [part], x)
    assert_equals_twin(weight.matmul(x), [part], x)
    assert_equals_twin(weight.matmul(x.float()), [part], x)
    for rows in COUNTS:
        assert torch.equal(weight.matmul(x[-rows:], dtype=torch.float32), together[-rows:])


@pytest.mark.parametrize("activations", LARGEST_Q)
def test_rounding_moves_a_number_by_half_a_step(activations: ActivationWidth) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[1, 3] = 1e4
    x[2] = 1e-35  # too small for a scale
    step = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1) / LARGEST_Q[activations]
    assert ((round_activations(x, activations) - x).abs() <= 0.501 * step + SMALLEST).all()


def test_parts_of_several_formats_lie_behind_one_another(isa: str) -> None:
    wide = torch.randn(21, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    parts = [packed("Q4_K", 40, 512), packed("Q6_K", 19, 512), wide, packed("Q8_0", 33, 512)]
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    for activations in LARGEST_Q:
        weight = QuantizedWeight(parts, activations)
        assert weight.out_features == 113
        for start, end in ((0, 113), (0, 40), (40, 59), (39, 81), (112, 113), (50, 50)):
            assert_equals_twin(weight.matmul(x, start, end), parts, x, start, end, activations)


def test_parts_that_lie_behind_one_another_in_memory_are_multiplied_as_one(isa: str) -> None:
    """As parts, some joined and some not, and as the one matrix that they are: interleaved or not, the same to the bit."""
    whole = packed("Q4_K", 112, 512)
    sizes, x = (32, 48, 5, 27), torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    parts = [PackedBlocks(whole.type, (len(blocks), 512), blocks) for blocks in whole.blocks.split(sizes)]
    places = torch.empty_like(whole.blocks).split(sizes)
    interleaved = [interleave(part, place.flatten()) for part, place in zip(parts, places, strict=True)]
    expected = QuantizedWeight([whole])
    for weight in (QuantizedWeight(parts), QuantizedWeight(interleaved), QuantizedWeight([parts[0], *interleaved[1:3], parts[3]])):
        for start, end in ((0, 112), (31, 81), (80, 85), (84, 86)):
            assert torch.equal(weight.matmul(x, start, end), expected.matmul(x, start, end))
        assert torch.equal(weight.decode(0, 112, torch.float32), expected.decode(0, 112, torch.float32))


def test_many_rows_are_multiplied_with_decoded_weights(isa: str) -> None:
    """Without rounding the activations: as the dense layer does."""
    parts = [packed("Q4_K", 300, 256), packed("Q5_0", 77, 256)]
    x = torch.randn(ROWS_IN_BLOCKS + 1, 256, generator=torch.Generator().manual_seed(1))
    matrix = torch.cat([dense(part) for part in parts])
    expected, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    for dtype, bound in ((torch.float32, TOLERANCE), (torch.bfloat16, 2.0**-7)):
        out = QuantizedWeight(parts).matmul(x.to(dtype), 5, 350)
        assert ((out.double() - expected[:, 5:350]).abs() <= bound * size[:, 5:350]).all()


@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_are_those_of_the_file(name: str, isa: str) -> None:
    part = packed(name, 13, 768)
    weight = QuantizedWeight([part])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.decode(2, 13, dtype), part.dequantize()[2:].to(dtype))


def test_nothing_is_read_behind_the_last_row(isa: str) -> None:
    """The last block ends where a page of memory ends, and the next page cannot be read."""
    import ctypes
    import mmap

    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    for name in NAMES:
        part = packed(name, 3, 768)
        size = part.blocks.numel()
        room = -(-size // page) * page
        memory = mmap.mmap(-1, room + page)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + room), page, 0) == 0  # PROT_NONE
        at_end = whole[room - size : room].view(3, -1)
        at_end.copy_(part.blocks)
        moved = PackedBlocks(part.type, part.shape, at_end)
        x = torch.randn(1, 768, generator=torch.Generator().manual_seed(1))
        assert_equals_twin(QuantizedWeight([moved]).matmul(x), [part], x)
        assert torch.equal(QuantizedWeight([moved]).decode(0, 3, torch.bfloat16), part.dequantize(torch.bfloat16))


@pytest.mark.parametrize("activations", LARGEST_Q)
@pytest.mark.parametrize(("width", "rows"), [(96, 2), (4096, 9)])  # rounded by the calling thread, and by all of them
def test_results_do_not_depend_on_the_number_of_threads(width: int, rows: int, activations: ActivationWidth, isa: str) -> None:
    part = packed("Q4_0", 3 * 1024 * 96 // width, width)
    weight, x = QuantizedWeight([part], activations), torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    before, outs = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outs.append(weight.matmul(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)
    assert_equals_twin(outs[0], [part], x, activations=activations)


def test_what_does_not_fit_is_refused() -> None:
    part = packed("Q4_0", 4, 64)
    with pytest.raises(ValueError, match="does not fit rows of 64"):
        QuantizedWeight([part, packed("Q4_0", 4, 96)])
    weight = QuantizedWeight([part])
    for x in (torch.zeros(1, 96), torch.zeros(1, 64, dtype=torch.float16), torch.zeros(64, 1)):
        with pytest.raises(ValueError, match="activations"):
            weight.matmul(x)
    with pytest.raises(ValueError, match="out"):
        weight.matmul(torch.zeros(1, 64), out=torch.zeros(1, 5))


def test_layer_stands_in_for_linear() -> None:
    part = packed("Q8_0", 24, 64)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(1))
    plain = Linear(64, 24, bias=True)
    plain.load_state_dict({"weight": part.dequantize(), "bias": bias})
    quantized, x = QuantizedLinear([part], bias), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        coarsest = x.abs().amax() / (2 * LARGEST_Q["int16"]) * plain.weight.abs().sum(-1)  # what half a step of the rounding adds up to
        assert ((quantized(x) - plain(x)).abs() <= coarsest + 1e-5).all()
        assert torch.equal(quantized.part(x, 8, 16), quantized(x)[..., 8:16])

"""DeepSeek's native rows: the bytes that the planner counts, the rounding of the published code, and nothing lost the second time."""

from __future__ import annotations

import math

import pytest
import torch

from kvshare.cache.codecs.deepseek import BlockFloatCodec, hadamard, power_above
from kvshare.layout.rows import BlockRow

KV, INDEX = BlockRow(8, 64, exact=64, align=8), BlockRow(4, 32)
LATENT, V32_INDEX = BlockRow(8, 128, scale_bytes=4, exact=64), BlockRow(8, 128, scale_bytes=4)
FORMS = [(KV, 512, 584), (INDEX, 128, 68), (LATENT, 576, 656), (V32_INDEX, 128, 132), (KV, 64 + 40, 176), (INDEX, 48, 26)]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def rows(width: int, count: int = 9, heads: int = 1) -> torch.Tensor:
    """Rows of very different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-4, 4, count)[:, None, None]
    return torch.cat([torch.randn(count, heads, width, generator=generator) * sizes, torch.zeros(1, heads, width)])


@pytest.mark.parametrize(("form", "width", "row_bytes"), FORMS)
def test_rows_have_the_planned_size_and_lose_nothing_twice(form: BlockRow, width: int, row_bytes: int) -> None:
    codec, given = BlockFloatCodec(form), rows(width)
    encoded = codec.encode(given)
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (len(given), row_bytes)
    assert form.vector_bytes(width) == row_bytes
    once = codec.decode(encoded, 1, width)
    assert torch.equal(codec.decode(codec.encode(once), 1, width), once)
    assert torch.equal(once[..., width - form.exact :], given[..., width - form.exact :].bfloat16())


def test_heads_lie_behind_one_another() -> None:
    given, codec = rows(128, heads=3), BlockFloatCodec(INDEX)
    assert codec.encode(given).shape == (len(given), 3 * 68)
    each = torch.cat([codec.rounded(given[:, head : head + 1]) for head in range(3)], dim=1)
    assert torch.equal(codec.rounded(given), each)


def test_four_bit_numbers_are_the_nearest_ones() -> None:
    given = rows(128)
    rounded = BlockFloatCodec(INDEX).rounded(given)
    for block, got in zip(given.view(-1, 32), rounded.view(-1, 32), strict=True):
        scale = 2.0 ** math.ceil(math.log2(max(block.abs().max().item(), 6 * 2.0**-126) / 6))
        nearest = [min((sign * value * scale for value in E2M1 for sign in (1, -1)), key=lambda v, x=x: abs(v - x)) for x in block.tolist()]
        assert got.tolist() == pytest.approx(nearest, abs=0)


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, *([0.0] * 24)]).view(1, 1, 32)
    assert BlockFloatCodec(INDEX).rounded(ties)[0, 0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert BlockFloatCodec(INDEX).rounded(-ties)[0, 0, :8].tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, -6.0]


def test_eight_bit_numbers_are_torchs_with_a_scale_for_each_block() -> None:
    given = rows(512)
    rounded = BlockFloatCodec(KV).rounded(given)[..., :448].reshape(-1, 64)
    blocks = given[..., :448].reshape(-1, 64)
    scale = torch.exp2(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4).double() / 448).ceil()).float()
    assert torch.equal(rounded, (blocks / scale).to(torch.float8_e4m3fn).float() * scale)
    assert (rounded - blocks).abs().max() <= blocks.abs().max() / 16


def test_scales_never_saturate_the_largest_number() -> None:
    assert power_above(torch.tensor([1.0, 1.0000001, 0.9999999, 0.5, 3.0, 2.0**-100])).tolist() == [0, 1, 0, -1, 2, -100]


def test_hadamard_keeps_inner_products_and_spreads_outliers() -> None:
    given = rows(128)[:, 0].double()
    assert torch.allclose(hadamard(hadamard(given)), given)
    assert torch.allclose(hadamard(given) @ hadamard(given).T, given @ given.T)
    assert torch.allclose(hadamard(torch.eye(128)[3]).abs(), torch.full((128,), 128**-0.5))

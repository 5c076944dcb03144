"""Rows that are encoded natively are those of the codec: to the byte, or where a rotation adds in another order, to a rounding border."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvshare import kernels
from kvshare.cache.codecs import Codec, codec_for
from kvshare.cache.codecs.deepseek import BlockFloatCodec
from kvshare.kernels.row_kind import row_encoder
from kvshare.layout import Stream
from kvshare.layout.rows import BlockRow, precision_named

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

PLAIN, ROTATED = ("int8", "fp8", "int4"), ("rot8", "rot9", "rot4", "rot3", "rot2")
SHAPES = [(1, 512), (3, 64), (2, 96), (1, 40), (5, 7)]


def given(heads: int, width: int, dtype: torch.dtype) -> Tensor:  # -> [rows, heads, width]
    """Rows of all magnitudes, some with outliers, one of zeros, not in one piece."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(90, heads + 1, width, generator=generator) * torch.logspace(-9, 9, 90)[:, None, None]
    rows[::4, :, 3] *= 50
    rows[7] = 0
    return rows.to(dtype)[:, 1:]


def encoded(codec: Codec, rows: Tensor) -> Tensor:
    encoder = row_encoder(codec, *rows.shape[1:])
    assert encoder is not None
    return encoder.encode(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), SHAPES)
@pytest.mark.parametrize("name", PLAIN)
def test_bytes_are_the_codecs(name: str, heads: int, width: int, dtype: torch.dtype, isa: str) -> None:
    rows, codec = given(heads, width, dtype), codec_for(precision_named(name), Stream("k", heads, width))
    assert torch.equal(encoded(codec, rows), codec.encode(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "width"),
    [
        (BlockRow(8, 64, exact=64, align=8), 512),
        (BlockRow(8, 128, scale_bytes=4, exact=8), 200),
        (BlockRow(4, 32), 128),
        (BlockRow(4, 16), 24),
    ],
)
def test_bytes_of_deepseeks_rows_are_the_codecs(form: BlockRow, width: int, dtype: torch.dtype, isa: str) -> None:
    rows, codec = given(2, width, dtype), BlockFloatCodec(form)
    rows[11] = torch.tensor([0.25, -0.75, 1.25, -1.75, 2.5, 3.5, -5.0, 6.0] * (width // 8))  # ties
    assert torch.equal(encoded(codec, rows), codec.encode(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), SHAPES)
@pytest.mark.parametrize("name", ROTATED)
def test_rotated_rows_lose_what_the_codec_loses(name: str, heads: int, width: int, dtype: torch.dtype, isa: str) -> None:
    rows, codec = given(heads, width, dtype), codec_for(precision_named(name), Stream("v", heads, width))
    native, ours = encoded(codec, rows), codec.encode(rows)
    assert (native != ours).float().mean() < 0.005
    lost, expected = ((codec.decode(each, heads, width) - rows.float()).norm(dim=-1) for each in (native, ours))
    assert torch.allclose(lost, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["int8", "int4", "rot8", "rot4"])
def test_balanced_keys_are_divided_first(name: str, isa: str) -> None:
    rows = given(2, 64, torch.bfloat16)[20:70]
    balance = (2.0 ** torch.randint(-3, 4, (2, 64), generator=torch.Generator().manual_seed(1))).bfloat16()
    codec = codec_for(precision_named(name), Stream("k", 2, 64), balance)
    differing = (encoded(codec, rows) != codec.encode(rows)).float().mean()
    assert differing < 0.005 if name.startswith("rot") else differing == 0


@pytest.mark.parametrize("name", PLAIN + ROTATED)
def test_what_is_no_number_stays_that(name: str, isa: str) -> None:
    rows = torch.randn(6, 2, 64)
    rows[1, 1, 5], rows[3, 0, 63] = torch.nan, torch.nan
    codec = codec_for(precision_named(name), Stream("v", 2, 64))
    wanted = codec.decode(codec.encode(rows), 2, 64)
    assert torch.equal(codec.decode(encoded(codec, rows), 2, 64).isnan(), wanted.isnan())


def test_threads_do_not_change_rows() -> None:
    rows, codec = torch.randn(400, 2, 64), codec_for(precision_named("rot4"), Stream("v", 2, 64))
    assert torch.equal(encoded(codec, rows), torch.cat([encoded(codec, row[None]) for row in rows]))

"""The kernels read the bytes that the codecs write, in every instruction set."""

from __future__ import annotations

import pytest
import torch

from kvshare import kernels
from kvshare.cache.codecs import codec_for
from kvshare.cache.codecs.deepseek import BlockFloatCodec
from kvshare.cache.codecs.rotated import _rotate
from kvshare.kernels.row_kind import decode_rows, row_kind
from kvshare.layout import Stream
from kvshare.layout.rows import BlockRow, precision_named

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

CODECS = ("bf16", "fp32", "int8", "fp8", "int4", "rot8", "rot9", "rot4", "rot3", "rot2")
BLOCK_FORMS = [
    (BlockRow(8, 64, exact=64, align=8), 512),
    (BlockRow(8, 128, scale_bytes=4, exact=64), 576),
    (BlockRow(8, 64, exact=8, align=8), 32),
    (BlockRow(8, 32), 128),
    (BlockRow(4, 32), 128),
    (BlockRow(4, 16), 48),
]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("heads", "width"), [(1, 512), (3, 64), (2, 96), (1, 40), (5, 7)])
def test_numbers_equal_the_codecs(name: str, heads: int, width: int, isa: str) -> None:
    generator = torch.Generator().manual_seed(width)
    given = torch.randn(21, heads, width, generator=generator) * torch.logspace(-6, 4, 21)[:, None, None]
    given[3] = 0
    codec = codec_for(precision_named(name), Stream("k", heads, width))
    kind = row_kind(codec)
    assert kind is not None
    encoded = codec.encode(given)
    padded = torch.full((len(encoded), encoded.shape[1] + 5), 0xFF, dtype=torch.uint8)
    padded[:, : encoded.shape[1]] = encoded
    wanted = codec.decode(encoded, heads, width).float()
    wanted = _rotate(wanted) if kind.rotated else wanted
    largest = wanted.abs().amax(-1, keepdim=True)
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)):
        got = decode_rows(padded[:, : encoded.shape[1]], kind, heads, width, dtype).float()
        assert ((got - wanted).abs() <= bound * largest).all()
        if not kind.rotated:
            assert torch.equal(got, wanted.to(dtype).float())


@pytest.mark.parametrize(("form", "width"), BLOCK_FORMS)
def test_numbers_of_deepseeks_rows_equal_the_codecs(form: BlockRow, width: int, isa: str) -> None:
    """All codes at ordinary exponents, and numbers so small or large that their exponent leaves that of bfloat16."""
    codec = BlockFloatCodec(form)
    kind = row_kind(codec)
    assert kind is not None
    generator = torch.Generator().manual_seed(width)
    encoded = codec.encode(torch.randn(300, 2, width, generator=generator) * torch.logspace(-30, 30, 300)[:, None, None])
    codes = (width - form.exact) * form.bits // 8
    encoded[::2, :codes] = torch.randint(0, 256, encoded[::2, :codes].shape, generator=generator, dtype=torch.uint8)
    wanted = codec.decode(encoded, 2, width)
    for dtype in (torch.float32, torch.bfloat16):
        got = decode_rows(encoded, kind, 2, width, dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(), wanted.to(dtype).nan_to_num())


@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_a_number_stays_that(name: str, isa: str) -> None:
    given = torch.randn(4, 2, 64)
    given[1, 1, 5] = torch.nan
    codec = codec_for(precision_named(name), Stream("k", 2, 64))
    kind = row_kind(codec)
    assert kind is not None
    got = decode_rows(codec.encode(given), kind, 2, 64, torch.float32)
    assert got[1, 1].isnan().any()
    assert not got[[0, 2, 3]].isnan().any()
    assert not got[1, 0].isnan().any()

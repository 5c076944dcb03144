"""Residual streams are mixed as their twins in plain torch mix them, in every instruction set."""

from __future__ import annotations

import pytest
import torch
from kernels.twins import DTYPES, Both, assert_equal, random
from torch import Tensor, nn

from kvshare import kernels
from kvshare.kernels import streams as native
from kvshare.layers.altup import AltUp, add_behind_first, mean_of, streams_of
from kvshare.layers.hyper_connections import HyperConnection, HyperHead
from kvshare.layers.norm import RMSNorm

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

STREAMS, SHAPES = 4, [(1, 64), (3, 330)]  # tokens and width


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for seed, parameter in enumerate(module.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))
    return module.to(dtype)


def assert_close(native: Tensor, twin: Tensor, size: float) -> None:
    """Within what a rounding border on the way can do to a number of this size; nearly everywhere much closer."""
    assert (native.dtype, native.shape) == (twin.dtype, twin.shape)
    unit = size * (2.0**-7 if twin.dtype == torch.bfloat16 else 2.0**-18)
    difference = (native.double() - twin.double()).abs()
    assert (difference <= unit).all()
    assert (difference > unit / 4).float().mean() <= 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_altup(tokens: int, width: int, dtype: torch.dtype, isa: str, both: Both) -> None:
    altup, gain = filled(AltUp(width, STREAMS, 1e-6), dtype), random(width, dtype=dtype)
    altup.scale = 0.3  # at 1 / width all that is routed of these would be next to 0
    x, active = random(tokens, STREAMS, width, dtype=dtype), random(tokens, width, dtype=dtype)
    with torch.no_grad():
        assert native.takes(x, altup.prediction.weight)
    assert_close(*both(altup.predict, x), 40.0)
    for weight in (None, gain):
        for part in (0, 1):
            assert_close(*both(lambda x, weight=weight, part=part: altup.correct(x, active, active, weight)[part], x), 40.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_streams_in_front_of_the_blocks_and_behind_them(tokens: int, width: int, dtype: torch.dtype, isa: str, both: Both) -> None:
    x = random(tokens, STREAMS, width, dtype=dtype)
    first, others = x[:, 0], [*random(tokens, (STREAMS - 1) * width, dtype=dtype, seed=1).split(width, dim=-1)]
    assert_close(*both(lambda first: streams_of(first, others), first), 10.0)
    others[1] = 1e-5 * others[1]  # below the least magnitude, and laid out in another way
    assert_close(*both(lambda first: mean_of(first, others), first), 10.0)
    norm = filled(RMSNorm(width, 1e-6), dtype)
    assert_close(*both(lambda first: add_behind_first(x.clone(), first, norm), first.contiguous()), 10.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_hyper_connections(tokens: int, width: int, dtype: torch.dtype, isa: str, both: Both) -> None:
    connection = filled(HyperConnection(width, STREAMS, 20, 1e-6, 1e-6), torch.float32)
    head, norm = filled(HyperHead(width, STREAMS, 1e-6, 1e-6), torch.float32), filled(RMSNorm(width, 1e-6), dtype)
    nn.init.normal_(connection.fn, std=(STREAMS * width) ** -0.5)
    x, out = random(tokens, STREAMS, width, dtype=dtype), random(tokens, width, dtype=dtype)
    assert_close(*both(lambda x: connection(x, norm).normed, x), 6.0)
    for part in (1, 2):
        weights, twin = both(lambda x, part=part: connection(x, norm)[part], x)
        torch.testing.assert_close(weights, twin, rtol=0, atol=2e-6)
    torch.testing.assert_close(weights.sum(-2), torch.ones(tokens, STREAMS), rtol=0, atol=1e-4)
    assert_equal(*both(lambda x: connection(x, norm).expand(out, x), x), 20.0)
    assert_close(*both(lambda x: head(x, norm), x), 6.0)


def test_streams_of_another_type_are_refused() -> None:
    x = random(1, STREAMS, 64, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be mixed"):
        native.add_behind_first_(x, random(1, 64, dtype=torch.float32), (0, False, 0.0, 1e-6))

"""Plain bfloat16 layers take the native product for few rows, and torch's for many, with gradients and in other types."""

from __future__ import annotations

import pytest
import torch

from kvshare import kernels
from kvshare.layers.embedding import Embedding
from kvshare.layers.few_rows import FEW_ROWS, FewRowsProduct
from kvshare.layers.linear import Linear

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.reason_unavailable()}")


def layer(bias: bool) -> Linear:
    torch.manual_seed(0)
    made = Linear(96, 40, bias)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.to(torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_product_is_that_of_float64_rounded_once(bias: bool) -> None:
    linear = layer(bias)
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        x = torch.randn(rows, 96).bfloat16()
        expected = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
        bound = 2.0**-7 * expected.abs() + 0.02
        assert ((linear(x) - expected).abs() <= bound).all()
        assert ((linear.part(x, 8, 16) - expected[:, 8:16]).abs() <= bound[:, 8:16]).all()


def test_who_multiplies() -> None:
    weight, x = torch.randn(40, 96).bfloat16(), torch.randn(1, 96).bfloat16()
    product = FewRowsProduct()
    assert product.of(weight, x) is None  # gradients are wanted
    with torch.no_grad():
        assert product.of(weight, x) is not None
        assert product.of(weight, x.expand(FEW_ROWS + 1, -1)) is None
        assert product.of(weight.float(), x.float()) is None
        assert product.of(weight[:, ::2], x[:, ::2]) is None
        moved = weight.clone()
        bound = product.of(moved, x)
        assert bound is not None
        moved.zero_()
        assert not bound.matmul(x).any()  # bound to where the weight lies now


@torch.no_grad()
def test_logits_of_few_rows_are_float32() -> None:
    embedding = Embedding(50, 96).to(torch.bfloat16)
    torch.nn.init.normal_(embedding.weight)
    hidden = torch.randn(1, 96).bfloat16()
    scores = embedding.scores(hidden)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), hidden.double() @ embedding.weight.double().T, rtol=1e-5, atol=1e-4)

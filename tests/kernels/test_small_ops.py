"""Norms, rotations, sums and activations equal their twins in plain torch, in every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.twins import DTYPES, WIDTHS, Both, assert_equal, random
from torch import Tensor

from kvshare import kernels
from kvshare.kernels import small_ops
from kvshare.layers.activations import GatedActivation, geglu, swiglu
from kvshare.layers.norm import RMSNorm, add_normed, add_then_norm
from kvshare.layers.rotary import Frequencies, Rotation
from kvshare.models.gemma_base import capped

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")


def norm_of(width: int, dtype: torch.dtype, offset: float, weighted: bool = True) -> RMSNorm:
    norm = RMSNorm(width, 1e-6, weighted, offset)
    if norm.weight is not None:
        torch.nn.init.normal_(norm.weight, 1 - offset, 0.3, generator=torch.Generator().manual_seed(width))
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width: int, dtype: torch.dtype, isa: str, both: Both) -> None:
    inputs = [
        random(3, width, dtype=dtype),
        random(0, width, dtype=dtype),
        random(2, 3, width, dtype=dtype),
        random(2, 5, width + 3, dtype=dtype)[:, 1:4, 2:-1],  # heads inside a longer row
        random(2, 2, 2, width, dtype=dtype),
        torch.zeros(1, width, dtype=dtype),
    ]
    for offset, weighted in ((0.0, True), (1.0, True), (0.0, False)):
        norm = norm_of(width, dtype, offset, weighted)
        for x in inputs:
            assert_equal(*both(norm, x))
    mixed = norm_of(width, torch.float32, 0.0)  # a weight that stays float32
    x = inputs[0]
    assert_equal(*both(mixed, x))


def residual(*args: Any) -> Tensor:
    return add_then_norm(*args)[0]


def normed_residual(*args: Any) -> Tensor:
    return add_then_norm(*args)[1]


def capped_copy(scores: Tensor) -> Tensor:
    return capped(scores.clone(), 30.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_residual_sums(width: int, dtype: torch.dtype, isa: str, both: Both) -> None:
    norm, other = norm_of(width, dtype, 1.0), norm_of(width, dtype, 0.0)
    scale = torch.tensor([0.37]).to(dtype)
    for rows in (0, 1, 5):
        x, y = random(rows, width, dtype=dtype), random(rows, 2 * width, dtype=dtype, seed=1)[:, :width]
        before = x.clone()
        size = x.double().abs() + other(y).detach().double().abs()
        assert_equal(*both(add_normed, x, y, other), size)
        assert_equal(*both(add_normed, x, y, other, scale), size)
        for y_norm in (None, other):
            assert_equal(*both(residual, x, y, norm, y_norm), size + y.double().abs())
            native, twin = both(normed_residual, x, y, norm, y_norm)
            assert_equal(native, twin, 2 * size.amax() if rows else 0.0)  # a unit of the sum may be more than one of its norm
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "pairs"), [(64, 32), (64, 8), (7, 3), (2, 1), (250, 125), (512, 64)])
def test_rotations(width: int, pairs: int, dtype: torch.dtype, isa: str, both: Both) -> None:
    frequencies = Frequencies(torch.rand(pairs, generator=torch.Generator().manual_seed(pairs)), 1.1)
    norm = norm_of(width, dtype, 1.0)
    for tokens, heads in ((0, 2), (1, 3), (4, 1), (5, 4)):
        positions = torch.arange(tokens) * 97
        rotation, precise = frequencies.at(positions, dtype), frequencies.at(positions, torch.float32)
        for x in (random(tokens, heads, width, dtype=dtype), random(tokens, heads + 2, width + 5, dtype=dtype)[:, 1:-1, 5:]):
            size = x.double().norm(dim=-1, keepdim=True)
            assert_equal(*both(rotation.half_split, x), size)
            assert_equal(*both(rotation.interleaved, x), size)
            assert_equal(*both(precise.interleaved, x), size)
            assert_equal(*both(rotation.half_split, x, norm), 2 * width**0.5)
            if dtype == torch.bfloat16:  # without a norm there is no order of summation: the very same bits
                assert torch.equal(*both(rotation.half_split, x))
                assert torch.equal(*both(rotation.interleaved, x))


def test_a_rotation_of_other_rows_or_types_is_left_to_torch() -> None:
    x = random(2, 3, 8, dtype=torch.bfloat16)
    one = Frequencies(torch.rand(4)).at(torch.tensor([5]), torch.bfloat16)
    both_rows = Rotation(one.cos.expand(2, 1, 4), one.sin.expand(2, 1, 4))
    with torch.no_grad():
        assert torch.equal(one.half_split(x), both_rows.half_split(x))
        assert Frequencies(torch.rand(4)).at(torch.tensor([5, 6]), torch.float32).half_split(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [swiglu, geglu, GatedActivation(limit=1.5)])
def test_gated_activations(activation: GatedActivation, dtype: torch.dtype, isa: str, both: Both) -> None:
    for width in WIDTHS:
        for rows in (0, 1, 3):
            packed = random(rows, 2 * width, dtype=dtype)
            gate, up = packed.chunk(2, dim=-1)
            size = gate.double().abs() * up.double().abs()
            assert_equal(*both(activation, gate, up), size)
    far = torch.tensor([[-1e4, -100.0, -90.0, -20.0, 20.0, 90.0, 100.0, 1e4, float("nan")]]).to(dtype)
    native, twin = both(activation, far, torch.ones_like(far))
    torch.testing.assert_close(native, twin, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deviations", [-0.4, 1.6])
def test_sparse_gates(deviations: float, dtype: torch.dtype, isa: str, both: Both) -> None:
    activation = GatedActivation(gelu=True, deviations=deviations)
    for width in WIDTHS[1:]:
        gate, up = random(3, width, dtype=dtype) + 1.25, random(3, width, dtype=dtype, seed=1)
        native, twin = both(activation, gate, up)
        unit = (2.0**-7 if dtype == torch.bfloat16 else 2.0**-18) * (
            1 + gate.float().abs().amax()
        )  # what all of a row's gates may be off by
        assert ((native.float() - twin.float()).abs() <= 1.2 * unit * up.float().abs()).all()
        assert torch.equal((native == 0).all(), torch.tensor(False))
        assert ((native == 0) != (twin == 0)).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_gates(dtype: torch.dtype, isa: str) -> None:
    x = random(3, 4, 10, dtype=dtype)
    with torch.no_grad():
        for gate in (8 * random(3, 4, dtype=dtype), 8 * random(3, 40, dtype=dtype)):
            by_number = torch.nn.functional.softplus(gate.float()).to(dtype).view(3, 4, -1)
            assert_equal(small_ops.softplus_gate(x, gate), x * by_number)
            assert_equal(small_ops.softplus_gate(x.transpose(0, 1).contiguous().transpose(0, 1), gate), x * by_number)
        with pytest.raises(ValueError, match="do not fit heads"):
            small_ops.softplus_gate(x, gate[:, :5])


def test_soft_cap(isa: str, both: Both) -> None:
    scores = torch.cat([40 * random(3, 1001, dtype=torch.float32), torch.tensor([[-1e9, 0.0, 1e9]]).repeat(3, 1)], dim=1)
    native, twin = both(capped_copy, scores)
    assert (native - twin).abs().max() <= 30 * 2.0**-21


def test_rows_and_threads_change_no_bit(isa: str) -> None:
    """A row's result is its own: in a batch large enough for several threads, and alone."""
    x, y = random(400, 700, dtype=torch.bfloat16), random(400, 700, dtype=torch.bfloat16, seed=1)
    norm = norm_of(700, torch.bfloat16, 1.0)
    before = torch.get_num_threads()
    with torch.no_grad():
        torch.set_num_threads(3)
        try:
            together = [norm(x), *add_then_norm(x, y, norm, norm), swiglu(x, y)]
        finally:
            torch.set_num_threads(before)
        for row in (0, 133, 399):
            one, other = x[row : row + 1], y[row : row + 1]
            alone = [norm(one), *add_then_norm(one, other, norm, norm), swiglu(one, other)]
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


def test_gradients_and_other_types_are_left_to_torch() -> None:
    norm = norm_of(8, torch.float32, 1.0)
    x = random(2, 8, dtype=torch.float32).requires_grad_()
    add_then_norm(x, x, norm, norm)[1].sum().backward()
    assert x.grad is not None
    assert norm.weight is not None
    assert norm.weight.grad is not None
    with torch.no_grad():
        for other in (x.half(), x.double(), x[:, ::2]):
            assert not small_ops.takes(other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_and_biases(dtype: torch.dtype, isa: str, both: Both) -> None:
    for width in WIDTHS:
        x, bias = random(3, width, dtype=dtype), random(width, dtype=dtype)
        assert torch.equal(*both(lambda x: small_ops.scaled(x.clone(), 1536**-0.5), x))
        assert torch.equal(*both(lambda x, bias: small_ops.with_bias(x.clone(), bias), x, bias))

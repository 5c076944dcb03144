"""Rows of embeddings, rotations of positions and the best logit equal their twins in plain torch, in every instruction set."""

from __future__ import annotations

import pytest
import torch
from kernels.twins import DTYPES, WIDTHS, Both, random

from kvshare import kernels
from kvshare.kernels import edges
from kvshare.layers.embedding import look_up
from kvshare.layers.rotary import Frequencies, frequencies

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")
ROWS = torch.tensor([0, 39, 7, 7, 12])


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table(dtype: torch.dtype, table_dtype: torch.dtype, isa: str, both: Both) -> None:
    """To the bit, with a factor that bfloat16 cannot spell, and columns of wider rows."""
    for width in WIDTHS:
        table = random(40, width, dtype=table_dtype)
        for scale in (1.0, width**0.5, 0.3):
            assert torch.equal(*both(look_up, table, ROWS, dtype, scale))
            assert torch.equal(*both(look_up, table, ROWS[:0], dtype, scale))
            assert torch.equal(*both(look_up, table, ROWS, dtype, scale, 1, width - 1))
        assert torch.equal(*both(look_up, random(40, width + 3, dtype=table_dtype)[:, 2:-1], ROWS, dtype, 0.3))


def test_rows_in_one_piece(isa: str) -> None:
    x = random(3, 4, 10, dtype=torch.bfloat16)
    for part in (x[:, 1], x[..., 3], x[:, 2, 1:7], x[:, 0, ::2], x[:1, 1], x[:0, 1]):
        with torch.no_grad():
            assert edges.packed(part).is_contiguous()
            assert torch.equal(edges.packed(part), part)


@pytest.mark.parametrize("row", [-1, 40])
def test_a_row_outside_the_table_is_refused(row: int) -> None:
    with torch.no_grad(), pytest.raises(IndexError, match=f"row {row} of a table of 40"):
        look_up(random(40, 8, dtype=torch.float32), torch.tensor([0, row]), torch.float32)


def test_tokens_behind_a_table_take_its_first_row(both: Both) -> None:
    assert both(edges.rows_or_first, torch.tensor([3, 9, 10, 11, 0]), 10)[0].tolist() == [3, 9, 0, 0, 0]


POSITIONS = torch.tensor([*range(700), 131_071, 262_143, 999_983])


@pytest.mark.parametrize("turn", [frequencies({}, 256), Frequencies(torch.rand(7), 1.3465), Frequencies(torch.zeros(1))])
def test_cosines_and_sines(turn: Frequencies, isa: str, both: Both) -> None:
    """Off by half of the last place, or twice that where there is a factor; in bfloat16 nearly everywhere the bits of torch."""
    native, twin = both(turn.at, POSITIONS, torch.float32)
    angles = (POSITIONS[:, None].float() * turn.inverse).double()
    for found, torchs, exact in ((native.cos, twin.cos, angles.cos()), (native.sin, twin.sin, angles.sin())):
        assert found.shape == torchs.shape == (len(POSITIONS), 1, len(turn.inverse))
        assert (found[:, 0] - exact * turn.factor).abs().max() <= (2.0**-24 if turn.factor == 1 else 2.0**-23 * turn.factor)
        assert (found - torchs).abs().max() <= 3 * 2.0**-24 * turn.factor
    native, twin = both(turn.at, POSITIONS, torch.bfloat16)
    for found, torchs in ((native.cos, twin.cos), (native.sin, twin.sin)):
        assert found.dtype == torch.bfloat16
        assert (found != torchs).float().mean() < 1e-4


def test_a_position_has_its_own_rotation(isa: str) -> None:
    """In a long prompt, on several threads, and alone."""
    turn, positions, before = frequencies({}, 128), torch.arange(2000), torch.get_num_threads()
    with torch.no_grad():
        torch.set_num_threads(3)
        together = turn.at(positions, torch.bfloat16)
        torch.set_num_threads(before)
        for position in (0, 777, 1999):
            alone = turn.at(positions[position : position + 1], torch.bfloat16)
            assert torch.equal(together.cos[position], alone.cos[0])
            assert torch.equal(together.sin[position], alone.sin[0])


def test_other_positions_and_types_are_left_to_torch() -> None:
    positions = torch.arange(6)
    with torch.no_grad():
        assert edges.takes(positions, torch.bfloat16)
        assert not edges.takes(positions[::2], torch.bfloat16)
        assert not edges.takes(positions.int(), torch.bfloat16)
        assert not edges.takes(positions, torch.float16)
    assert not edges.takes(positions, torch.bfloat16)  # a gradient may be wanted
    weight = random(8, 4, dtype=torch.float32).requires_grad_()
    look_up(weight, positions, torch.float32, 3.0).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("count", [1, 2, 63, 4096, 4097, 50_000])
def test_argmax(count: int, isa: str) -> None:
    scores = random(count, dtype=torch.float32)
    assert edges.argmax(scores) == int(scores.argmax())
    for places in ([count - 1], [count // 2, count - 1], [0, count // 3]):
        scores[places] = scores.max() + 1
        assert edges.argmax(scores) == min(places)
    assert edges.argmax(torch.full((count,), -torch.inf)) == 0
    scores[count // 2] = torch.nan
    assert edges.argmax(scores) == count // 2
    assert edges.argmax(scores.double()) == count // 2

"""The arena hands out pages once, frees them once, and never loses one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare.cache.arena import Arena
from kvshare.errors import CapacityError


@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 7)), max_size=60))
def test_free_and_held_make_the_whole_after_any_operations(operations: list[tuple[str, int]]) -> None:
    arena, holders = Arena(12, 4096), list[int]()
    for operation, number in operations:
        if operation == "allocate":
            if number > arena.num_free:
                with pytest.raises(CapacityError, match=f"needs {number} more pages"):
                    arena.allocate(number)
            else:
                taken = arena.allocate(number)
                assert taken == sorted(set(range(12)) - set(holders))[:number]  # what is taken together lies together where it can
                holders += taken
        elif holders and operation == "retain":
            arena.retain([holders[number % len(holders)]])
            holders.append(holders[number % len(holders)])
        elif holders:
            arena.release([holders.pop(number % len(holders))])
        assert arena.num_held == len(set(holders))
        assert arena.num_free + arena.num_held == 12
        arena.check_integrity()
    arena.release(holders)
    assert arena.num_free == 12


def test_a_page_released_twice_is_noticed() -> None:
    arena = Arena(2, 4096)
    (page,) = arena.allocate(1)
    arena.release([page])
    with pytest.raises(AssertionError, match="released twice"):
        arena.release([page])


def test_integrity_check_sees_a_lost_page() -> None:
    arena = Arena(2, 4096)
    arena._free.pop()
    with pytest.raises(AssertionError, match="0 references and is held"):
        arena.check_integrity()


def test_rows_of_a_page_with_slack_do_not_overlap() -> None:
    arena = Arena(2, 4096)
    rows = arena.rows(1000)
    assert rows.shape == (2, 4, 1000)
    rows[0].fill_(1)
    assert not (arena.pages[1] == 1).all()
    assert int((arena.pages[0] == 1).sum()) >= 4000

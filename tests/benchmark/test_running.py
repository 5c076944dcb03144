"""Points that would take too long are not tried, where a shorter prompt tells so; nor is anything said where it does not."""

from __future__ import annotations

import pytest

from benchmarks.bandwidth import Point
from benchmarks.engines import engine_named
from benchmarks.running import pace_of_the_hopeless
from kvshare.benchmark.summary import unfinished

ROW = {"context": 16_384, "batch": 1, "ttft_s": 216.0}


@pytest.mark.parametrize(
    ("left", "limit", "hopeless"),
    [
        ([(65_536, 1)], 600, True),  # 864 s
        ([(32_768, 1), (65_536, 1)], 600, False),  # 432 s: perhaps
        ([(32_768, 1), (65_536, 1)], 400, True),
        ([(4_096, 8)], 400, False),  # shorter prompts may be faster by the token
        ([], 1, False),
    ],
)
def test_longer_prompts_take_no_less_by_the_token(left: list[Point], limit: float, hopeless: bool) -> None:
    pace = pace_of_the_hopeless(ROW, left, limit)
    assert pace == (pytest.approx(216 / 16_384) if hopeless else None)


def test_what_was_not_tried_says_why() -> None:
    assert unfinished({"at_least_s": 864.0, "limit_s": 600.0}).startswith("longer than 600 s: 864 s")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kvshare-int4+act-int8", {"weights": "int4", "activations": "int8"}),
        ("kvshare+kv-rot4+32", {"kv_dtype": "rot4+32"}),
        ("kvshare+kv-rot4+32+act-int8", {"kv_dtype": "rot4+32", "activations": "int8"}),
    ],
)
def test_a_name_says_the_precisions(name: str, options: dict[str, str]) -> None:
    assert engine_named(name).options == options


@pytest.mark.parametrize("name", ["llama.cpp+act-int8", "kvshare+32", "other"])
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(KeyError):
        engine_named(name)

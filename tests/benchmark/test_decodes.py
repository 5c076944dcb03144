"""On a machine whose bandwidth moves: steps are timed several times, and rounds in which engines met different machines are marked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures import tiny_llama

from benchmarks.bandwidth import PAUSE_SECONDS, Bandwidth
from benchmarks.engines.decodes import ATTEMPTS, decodes
from benchmarks.report import tables
from benchmarks.running import run_engine
from kvshare.benchmark.machine import ReadProbe
from kvshare.benchmark.summary import summarize


def timed(seconds: list[float], reads: list[float | None]) -> dict[str, Any]:
    """What `decodes` returns where steps take `seconds` and the machine reads at `reads`, one after the other."""
    took, speeds = iter(seconds), iter(reads)
    return decodes(lambda: next(took), ask=lambda: next(speeds))


def test_where_the_bandwidth_stays_the_middle_of_three_counts() -> None:
    found = timed([0.1, 0.3, 0.11], [45.0, 51.0, 50.0, 49.0])
    assert (found["decode_s"], found["around_gb_s"], len(found["decodes"])) == (0.11, [50.0, 49.0], 3)


def test_steps_are_timed_again_where_it_moved_and_everything_is_kept() -> None:
    found = timed([0.1, 0.06, 0.07, 0.061], [45.0, 75.0, 74.0, 73.0, 76.0])
    assert (found["decode_s"], found["around_gb_s"]) == (0.061, [73.0, 76.0])
    assert found["decodes"][0] == {"decode_s": 0.1, "before_gb_s": 45.0, "after_gb_s": 75.0}


def test_of_attempts_that_all_moved_the_steadiest_counts() -> None:
    found = timed([0.1, 0.2, 0.3, 0.4, 0.5], [40.0, 80.0, 60.0, 90.0, 45.0, 90.0])
    assert len(found["decodes"]) == ATTEMPTS
    assert (found["decode_s"], found["around_gb_s"]) == (0.2, [80.0, 60.0])


def test_an_engine_that_nobody_measures_for_is_timed_once() -> None:
    found = timed([0.1], [None, None])
    assert (found["around_gb_s"], len(found["decodes"])) == ([], 1)


def row(engine: str, number: int, seconds: float, around: list[float]) -> dict[str, Any]:
    limits = {"read_gb_s": 80.0, "gemm_gflop_s": 900.0}
    return {"round": number, "engine": engine, "context": 512, "batch": 1, "ttft_s": 1.0, "decode_s": seconds} | {
        "around_gb_s": around,
        "step_bytes": 4_000_000_000,
        "peak_rss_bytes": 1,
        "peak_anonymous_bytes": 1,
        **limits,
    }


SAME = [row("ours", 0, 0.10, [45.0, 46.0]), row("theirs", 0, 0.20, [45.0, 50.0])]  # 89 % and 40 % of the bandwidth
MOVED = [row("ours", 1, 0.10, [45.0, 45.0]), row("theirs", 1, 0.12, [75.0, 75.0])]  # 89 % and 44 %


def table_of(rows: list[dict[str, Any]]) -> str:
    document = {"model": "m", "engines": ["ours", "theirs"], "machine": {"processor": "p"}, "threads": 2, "started": "2026", "seconds": 60}
    return tables({**document, "rows": rows})


def test_rounds_of_different_bandwidths_do_not_count_where_there_are_others() -> None:
    _, theirs = summarize([*SAME, *MOVED], "ours")
    assert (theirs.compared, theirs.marked) == (2, 1)
    assert theirs.decode_ratio == pytest.approx(2.0)
    assert theirs.level_ratio == pytest.approx((0.2 / 0.1 * 50 / 46 + 0.12 / 0.1 * 75 / 45) / 2)
    text = table_of([*SAME, *MOVED])
    assert "1.00, 2.00 (1 of 2) | 2.09 |" in text
    assert "In 1 of 2 pairs of a round" in text


def test_where_no_other_round_is_left_the_ratio_is_marked() -> None:
    text = table_of(MOVED)
    assert r"1.00, 1.20\* | 2.00 |" in text
    assert "In 1 of 1 pairs of a round" in text


def test_nothing_is_marked_where_the_machine_stayed() -> None:
    text = table_of(SAME)
    assert "1.00, 2.00 | 2.17 |" in text
    assert r"\*" not in text


def test_the_highest_bandwidth_around_the_steps_is_the_limit() -> None:
    ours, _ = summarize(SAME, "ours")
    assert ours.read_share == pytest.approx(40 / 46)


def probe(*speeds: float) -> Callable[[], float]:
    left = iter(speeds)
    return lambda: next(left)


def test_later_engines_wait_for_the_machine_that_the_first_one_met() -> None:
    slept = list[float]()
    bandwidth = Bandwidth(probe(80.0, 45.0, 46.0, 82.0, 45.0, 80.0), 60, slept.append)
    assert bandwidth.before((512, 1)) == 80.0  # nobody was there before
    bandwidth.met((512, 1), [80.0, 78.0])
    bandwidth.met((512, 1), [46.0])  # of a later engine: it does not count
    assert bandwidth.before((512, 1)) == 82.0
    assert slept == [PAUSE_SECONDS] * 2
    assert bandwidth.before((4096, 1)) == 45.0  # another point
    bandwidth.begin_round()
    assert bandwidth.before((512, 1)) == 80.0


def test_waiting_ends_with_the_patience() -> None:
    slept = list[float]()
    bandwidth = Bandwidth(lambda: 45.0, 3 * PAUSE_SECONDS, slept.append)
    bandwidth.met((512, 1), [80.0])
    assert bandwidth.before((512, 1)) == 45.0
    assert len(slept) == 3


def test_only_the_first_question_at_a_point_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real engine, two points: it is kept waiting before it times its steps, and never between them and the measurement behind."""
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    slept = list[float]()
    bandwidth = Bandwidth(probe(*[80.0] * 4, 45.0, 80.0, *[45.0] * 4), 60, slept.append)
    bandwidth.met((24, 1), [80.0])
    rows = list(run_engine("kvshare", str(tiny_llama(tmp_path)), [(16, 1), (24, 1)], {"decode": 2, "dtype": "float32"}, 1, 120, bandwidth))
    assert [each["around_gb_s"] for each in rows] == [
        [80.0, 80.0],
        [45.0, 45.0],
    ]  # the second point: 45, waited, 80, and four times steps and 45
    assert slept == [PAUSE_SECONDS]


def test_engines_ask_and_the_benchmark_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real engines in processes of their own, while the bandwidth is said to jump after the first question."""
    model = tiny_llama(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    for name in ("kvshare", "transformers"):
        bandwidth = Bandwidth(probe(40.0, *[80.0] * 4), 0)
        rows = list(run_engine(name, str(model), [(24, 1)], {"decode": 2, "dtype": "float32"}, 1, 120, bandwidth))
        assert [each["around_gb_s"] for each in rows] == [[80.0, 80.0]], rows
        assert [(each["before_gb_s"], each["after_gb_s"]) for each in rows[0]["decodes"]] == [(40.0, 80.0), *[(80.0, 80.0)] * 3]


def test_the_probe_reads_a_plausible_number_of_bytes_a_second() -> None:
    assert 0.1 < ReadProbe()() < 10_000

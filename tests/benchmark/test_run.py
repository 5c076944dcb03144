"""Measuring a model: every sequence decodes every step, nothing is left behind, and shares are of the round that they belong to."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures import tiny_llama

from kvshare import LLM, kernels
from kvshare.benchmark.profile import PROFILED_STEPS
from kvshare.benchmark.run import measure, room
from kvshare.benchmark.summary import summarize
from kvshare.errors import RequestError


@pytest.mark.parametrize("batch", [1, 5])
def test_all_sequences_decode_together(tmp_path: Path, batch: int) -> None:
    llm = LLM(tiny_llama(tmp_path), max_context=room(40, batch, 6, 512), max_sequences=batch, chunk=512, progress=False)
    steps, heard = [], []
    advance = llm.engine.step
    llm.engine.step = lambda: steps.append(advance()) or steps[-1]
    found = measure(llm, 40, batch, 6, lambda done, total: heard.append((done, total)))
    assert [len(updates) for updates in steps[-6 - PROFILED_STEPS :]] == [batch] * (6 + PROFILED_STEPS), (
        "a decode step gives every sequence a token"
    )
    assert heard[-1] == (40 * batch + 6, 40 * batch + 6)
    assert found.held_bytes >= batch * llm.layout.held_bytes(45, 1, llm.engine.precision)
    assert found.step_bytes is not None
    assert found.step_bytes > llm.layout.read_bytes(40, batch, llm.engine.precision)
    assert not llm.engine.has_work
    assert llm.arena.num_held == 0


def test_a_profile_parts_the_time_of_a_step(tmp_path: Path) -> None:
    llm = LLM(tiny_llama(tmp_path), dtype="bfloat16", max_context=room(40, 1, 2, 512), progress=False)
    profile = measure(llm, 40, 1, 2).profile
    assert sum(part.seconds for part in profile.parts) == pytest.approx(profile.step_s)
    parts = [part.seconds for part in profile.parts[:3]]
    assert profile.cache_bytes == llm.layout.read_bytes(40 + 2 + PROFILED_STEPS // 2, 1, "bf16")
    if kernels.available():
        assert all(seconds > 0 for seconds in parts)
        assert profile.attentions == len(llm.layout.layers)
        assert profile.products > 4 * len(llm.layout.layers)  # and the head
    else:
        assert parts == [0, 0, 0]


def test_a_context_without_room_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    llm = LLM(tiny_llama(tmp_path), max_context=64, progress=False)
    with pytest.raises(RequestError, match="context"):
        measure(llm, 100, 1, 4)
    assert not llm.engine.has_work


def row(number: int, engine: str, ttft: float, decode: float, read: float = 10.0) -> dict[str, object]:
    machine = {"read_gb_s": read, "gemm_gflop_s": 100.0}
    work = {"step_bytes": 2_000_000_000, "prompt_flops": 50_000_000_000}
    return {"round": number, "engine": engine, "context": 512, "batch": 1, "ttft_s": ttft, "decode_s": decode, **machine, **work}


def test_shares_and_ratios_are_of_their_own_round() -> None:
    slow = [row(1, "ours", 4.0, 0.8, read=5.0), row(1, "other", 8.0, 0.8, read=5.0)]
    rows = [row(0, "ours", 1.0, 0.25), row(0, "other", 2.0, 0.5), *slow, row(2, "ours", 1.0, 0.25), row(2, "other", 3.0, 0.5)]
    ours, other = summarize(rows, "ours")
    assert (ours.engine, ours.rounds, ours.prefill_ratio) == ("ours", 3, None)
    assert ours.read_share == pytest.approx(0.8)  # 8 of 10 GB/s, 2.5 of 5, 8 of 10
    assert ours.gemm_share == pytest.approx(0.5)
    assert (other.prefill_ratio, other.decode_ratio) == (2.0, 2.0)  # of 2, 2, 3 and 2, 1, 2; of the medians it would be 3


def test_what_did_not_finish_is_said() -> None:
    place = {"round": 0, "engine": "other", "context": 65_536, "batch": 1}
    (late,) = summarize([{**place, "unfinished_s": 600}], "ours")
    (failed,) = summarize([{**place, "error": "out of memory"}], "ours")
    assert (late.note, late.decode_tok_s) == ("not finished in 600 s", None)
    assert failed.note == "out of memory"

"""Each kind of file that the benchmarks write becomes tables."""

from __future__ import annotations

import pytest

from benchmarks.highlights import against_others
from benchmarks.report import markdown
from kvshare.benchmark.profile import StepProfile

STEP = {"step_s": 0.020, "products_s": 0.015, "attention_s": 0.002, "small_s": 0.001, "products": 200, "attentions": 35, "smalls": 300}


def test_a_comparison_says_where_steps_go() -> None:
    row = {"round": 0, "engine": "kvshare", "context": 4096, "batch": 1, "read_gb_s": 50.0, "gemm_gflop_s": 900.0, "ttft_s": 8.0}
    row |= {"decode_s": 0.02, "step_bytes": 800_000_000, "prompt_flops": 5_760_000_000_000, "least_flops": 3_600_000_000_000}
    row |= {"profile": {**STEP, "weight_bytes": 600_000_000, "cache_bytes": 100_000_000}}
    other = {"round": 0, "engine": "other", "context": 4096, "batch": 1, "read_gb_s": 50.0, "gemm_gflop_s": 900.0, "error": "no"}
    document = {
        "model": "m",
        "engines": ["kvshare", "other"],
        "machine": {"processor": "p"},
        "threads": 2,
        "started": "2026",
        "seconds": 60,
    }
    text = markdown({**document, "rows": [row, other]})
    assert "| kvshare | 4,096 | 1 | 8.00 | 512 | 80% (50%) | 50.00 | 80% |" in text
    assert "| kvshare | 4,096 | 1 | 20.0 | 15.0 in 200 calls, 40 GB/s | 2.0 in 35 calls, 50 GB/s | 1.0 in 300 calls | 2.0 |" in text


def test_what_no_kernel_did_is_left_to_python() -> None:
    profile = StepProfile(**{**STEP, "products_s": 0.0, "products": 0}, weight_bytes=None, cache_bytes=1)
    assert [part.seconds for part in profile.parts] == pytest.approx([0.0, 0.002, 0.001, 0.017])


def test_kernels_and_memory() -> None:
    result = {"part": "products", "kernel": "Q4_0", "read_gb_s": 40.0, "gemm_gflop_s": 900.0, "seconds": 0.001, "amount": 30_000_000}
    result |= {"limit": "read", "other": "bf16 linear", "share": 0.75, "speedup": 3.0}
    results = [{**result, "work": "2 x 3, 1 rows", "share_alone": 0.9}, {**result, "work": "2 x 3, 8 rows"}]
    assert "| 2 x 3 | Q4_0 | 90% | 75% (3.0) | 75% (3.0) |" in markdown(
        {"isa": "avx512", "threads": 2, "processor": "p", "results": results}
    )
    phase = {
        "anonymous": 900_000_000,
        "files": 5_000_000,
        "weight_bytes": 1,
        "planned_bytes": 2_000_000,
        "cache_bytes": 1_000_000,
        "seconds": 9.0,
    }
    memory = {"context": 131_072, "last": 600, "base_bytes": 100_000_000, "bar_bytes": 850_000_000, "weights": "int4", "kv_dtype": None}
    memory |= {"chunk": 512, "phases": dict.fromkeys(("base", "load", "prefill", "decode"), phase)}
    assert "| 131,072 | 100 | 800 | 800 | 800 | 850 | 0 | 2 | 1 | 5 | last 600 | 9 |" in markdown({"model": "/a/m", "rows": [memory]})


def test_like_is_compared_with_like() -> None:
    def row(engine: str, seconds: float, number: int = 0) -> dict[str, object]:
        return {"round": number, "engine": engine, "context": 512, "batch": 1, "ttft_s": seconds, "decode_s": seconds / 10}

    engines = ["kvshare", "llama.cpp", "kvshare-bf16", "transformers"]
    rows = [row(engine, seconds) for engine, seconds in zip(engines, (1.0, 2.0, 2.0, 8.0), strict=True)]
    slow = [row("kvshare", 2.0, 1), row("llama.cpp", 4.0, 1)]  # a slower round of the same
    unfinished = {"round": 0, "engine": "other", "context": 512, "batch": 1, "error": "no"}
    table = against_others([{"model": "m", "engines": [*engines, "other"], "rows": [*rows, *slow, unfinished]}, {"results": []}])
    assert table.splitlines()[2:] == ["| m | llama.cpp | 512 tokens | 2.0 × | 2.0 × |", "| m | transformers | 512 tokens | 4.0 × | 4.0 × |"]

"""Generated parts of the documentation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from generate_docs import GENERATORS, fill

PAGE = """# A page

<!-- output: kvshare plan gemma-4-E2B -->
what an older version printed
<!-- end -->

in between

<!-- output: support table -->
<!-- end -->
"""


def test_parts_are_replaced_by_what_the_code_prints_and_the_rest_stays():
    page = fill(PAGE)
    assert "older version" not in page
    assert "```console\n$ kvshare plan gemma-4-E2B\ngemma-4-E2B: 131,072 tokens, bf16 cache" in page
    assert "without sharing" in page
    assert page.startswith("# A page\n\n<!-- output: kvshare plan gemma-4-E2B -->\n")
    assert "<!-- end -->\n\nin between\n\n<!-- output: support table -->\n| family |" in page
    assert fill(page) == page


def test_every_architecture_stands_on_the_support_page():
    from kvshare.layout.rules import RULES
    from kvshare.models import DRAFTERS

    page = GENERATORS["support table"]() + GENERATORS["planned only"]()
    assert all(f"`{name}`" in page for name in RULES if name not in DRAFTERS)
    assert "compact, v-only" in page


def test_what_nothing_generates_is_refused():
    with pytest.raises(SystemExit, match="nothing generates 'weather'"):
        fill("<!-- output: weather -->\n<!-- end -->\n")


def test_a_command_that_fails_is_refused_with_its_message():
    with pytest.raises(SystemExit, match="did you mean"):
        fill("<!-- output: kvshare plan gemma-4-E9B -->\n<!-- end -->\n")


def test_measurements_become_a_table(tmp_path: Path):
    row = {"round": 0, "engine": "kvshare", "read_gb_s": 40.0, "gemm_gflop_s": 900.0, "context": 512, "batch": 1}
    done = {**row, "ttft_s": 0.5, "decode_s": 0.1, "step_bytes": 3_600_000_000, "prompt_flops": None, "peak_rss_bytes": 7_000_000_000}
    other = {**row, "engine": "peer", "unfinished_s": 600}
    machine = {"processor": "a processor"}
    document = {"model": "shape", "engines": ["kvshare", "peer"], "threads": 2, "started": "2026-11-22 07:45:00", "seconds": 60}
    file = tmp_path / "e2b.json"
    file.write_text(json.dumps({**document, "machine": machine, "rows": [done, other]}))
    page = fill(f"<!-- output: {file} -->\n<!-- end -->\n")
    assert "| kvshare | 512 | 1 | 0.50 | 1,024 |  | 10.00 | 90% |  |  |  | 7.00 |  |" in page
    assert "| peer | 512 | 1 | not finished in 600 s |" in page

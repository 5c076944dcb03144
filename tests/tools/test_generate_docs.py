"""Generated parts of the documentation."""

from __future__ import annotations

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

"""`kvshare demo` with the trained model in the package: what it prints is what its arena did, and it can fail."""

from __future__ import annotations

import re

import pytest
from cli.command import Command

from kvshare.cache.arena import Arena


def test_demo_prints_plan_text_and_equal_bytes(command: Command) -> None:
    result = command("demo", "--max-tokens", 12)
    assert result.status == 0
    assert "demo: 2,011 tokens" in result.out
    found = re.search(r"planned +([\d,]+) B\s+allocated +([\d,]+) B +equal after each of 11 steps", result.out)
    assert found
    assert found[1] == found[2]
    assert re.search(r"1,999 rows +of 2,000 of the prompt, in 5 of 10 layers", result.out)
    assert len(re.findall("█+ ", result.out)) == 4


def test_the_same_seed_gives_the_same_text(command: Command) -> None:
    texts = [re.findall(r"Heb.*?─", command("demo", "--max-tokens", 30, "--seed", seed).out, re.DOTALL)[-1] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_demo_fails_where_the_arena_is_not_the_plan(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = Arena.allocate
    monkeypatch.setattr(Arena, "allocate", lambda arena, count: allocate(arena, count + (count > 0))[:count])
    result = command("demo", "--max-tokens", 12)
    assert result.status == 1
    assert "NOT equal in 11 steps" in result.out


def test_a_demo_longer_than_the_context_is_refused(command: Command) -> None:
    result = command("demo", "--max-tokens", 9000)
    assert result.status == 2
    assert "at most 6,192 fit behind the 2,000 tokens of the prompt" in result.err

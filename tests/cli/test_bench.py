"""`kvshare bench` on a random model: what it prints, what it refuses. No figure is held to a clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.command import Command

SHORT = ("--context", "32,64", "--decode", 4, "--rounds", 1)


def test_every_point_of_every_round_is_in_the_json(command: Command, tiny: Path, tmp_path: Path) -> None:
    plot = tmp_path / "speed.svg"
    result = command("bench", tiny, *SHORT[:-1], 2, "--batch", "1,3", "--json", "--plot", plot)
    assert result.status == 0, result.err
    found = json.loads(result.out)
    points = [(row["round"], row["batch"], row["context"]) for row in found["rows"]]
    assert sorted(points) == [(number, batch, context) for number in (0, 1) for batch in (1, 3) for context in (32, 64)]
    assert all(row["ttft_s"] > 0 and row["decode_s"] > 0 and row["read_gb_s"] > 0 and row["prompt_flops"] > 0 for row in found["rows"])
    assert plot.read_text().lstrip().startswith("<?xml")


def test_the_table_has_a_line_for_each_point(command: Command, tiny: Path) -> None:
    result = command("bench", tiny, *SHORT, "--kv-dtype", "int8", "--profile")
    assert result.status == 0, result.err
    assert "int8 cache" in result.out
    lines = [line.split() for line in result.out.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in ("32", "64")] == [["32", "1"], ["64", "1"]] * 2
    assert result.out.count("Python and torch") == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--batch", "0"), "no number of sequences"),
        (("--batch", ","), "names nothing"),
        (("--context", "long"), "not a number of tokens"),
        (("--plot", "speed.gif"), "must end in"),
        (("--context", "1m"), "1,048,"),
    ],
)
def test_mistakes_are_one_line(command: Command, tiny: Path, arguments: tuple[str, str], problem: str) -> None:
    result = command("bench", tiny, *arguments)
    assert result.status == 2
    assert problem in result.err
    assert "Traceback" not in result.err

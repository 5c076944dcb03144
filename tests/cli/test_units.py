"""Sizes as people write them."""

from __future__ import annotations

import pytest

from kvshare.cli.units import format_bytes, format_count, parse_bytes, parse_tokens
from kvshare.errors import RequestError


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("128k", 131_072), ("128K", 131_072), ("1m", 1_048_576), ("0.5k", 512), (" 32 k ", 32_768), ("100_000", 100_000)],
)
def test_tokens(text: str, tokens: int):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("22GiB", 22 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512MB", 512 * 10**6),
        ("1TB", 10**12),
        ("64KiB", 65_536),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_bytes(text: str, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "k", "-4k", "12z", "12 GB", "1e3", "0", "0.3", "1.2.3k", "nan", "٣k"])
def test_what_is_no_number_of_tokens_is_refused_with_examples(text: str):
    with pytest.raises(RequestError, match=r"128k|at least 1"):
        parse_tokens(text)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24XB", "24 G B", "0", "0GB", "1.5B"])
def test_what_is_no_size_is_refused_with_examples(text: str):
    with pytest.raises(RequestError, match=r"22GiB|at least 1"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (6_291_456, "6.29 MB"),
        (99_999_999, "100.00 MB"),
        (811_597_824, "0.812 GB"),
        (1_234_567_890_123, "1,234.568 GB"),
    ],
)
def test_sizes_are_printed_in_powers_of_ten(count: int | None, text: str):
    assert format_bytes(count) == text


def test_counts():
    assert format_count(2_279_759_104) == "2.28 billion"
    assert format_count(7_600_000) == "7.6 million"

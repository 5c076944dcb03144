"""Sizes as people write them: `128k` tokens, `24GB` or `22GiB` of memory. The only place that reads or prints them."""

from __future__ import annotations

import re
from fractions import Fraction

from kvshare.errors import RequestError

_NUMBER = re.compile(r"\s*([0-9]+(?:[._][0-9]+)*)\s*([a-zA-Z]*)\s*")
_TOKENS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_BYTES = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_tokens(text: str) -> int:
    """`4096`, `128k` (131,072) or `1m` (1,048,576) tokens. Raises `RequestError` for anything else."""
    return _parse(text, _TOKENS, "a number of tokens", "4096, 128k (= 131,072) or 1m")


def parse_bytes(text: str) -> int:
    """`24GB` (10^9), `22GiB` (2^30), `512MB` or a plain number of bytes. Raises `RequestError` for anything else."""
    return _parse(text, _BYTES, "a size in memory", "24GB (= 24,000,000,000 bytes), 22GiB or 512MB")


def _parse(text: str, units: dict[str, int], what: str, examples: str) -> int:
    match = _NUMBER.fullmatch(text)
    unit = match.group(2).casefold() if match else ""
    if match is None or unit not in units:
        raise RequestError(f"{text!r} is not {what}: write it like {examples}")
    try:
        value = Fraction(match.group(1).replace("_", "")) * units[unit]
    except ValueError:
        raise RequestError(f"{text!r} is not {what}: write it like {examples}") from None
    if value.denominator != 1 or value < 1:
        raise RequestError(f"{text!r} is {float(value):g}: {what} must be a whole number of at least 1")
    return value.numerator


def format_count(count: int) -> str:
    """`2.28 billion`, `7.6 million`."""
    return f"{count / 1e9:,.2f} billion" if count >= 10**8 else f"{count / 1e6:,.1f} million"


def format_bytes(count: int | None) -> str:
    """`0.812 GB`, `6.29 MB`, `896 B`: GB is 10^9 bytes."""
    if count is None:
        return "-"
    for unit, size, least, digits in (("GB", 10**9, 10**8, 3), ("MB", 10**6, 10**6, 2), ("kB", 10**3, 10**3, 2)):
        if count >= least:
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count} B"

"""What `kvshare tune -o NAME.json --plot NAME.svg` wrote, of several models, as one table and their figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def markdown(directory: Path) -> str:
    """A row for each .json file in `directory`, then the .svg files of the same names, as seen from the page beside it."""
    files = sorted(directory.glob("*.json"))
    lines = ["| model | within | owners in each precision | KL | same top token | of bf16's bytes |", "|---|---|---|---|---|---|"]
    lines += [_row(file.stem, json.loads(file.read_text())) for file in files]
    figures = [f"![{file.stem}: what an owner's precision costs]({directory.name}/{file.stem}.svg)" for file in files]
    return "\n".join([*lines, "", *figures]) + "\n"


def _row(name: str, found: Mapping[str, Any]) -> str:
    by_precision: dict[str, list[int]] = {}
    for owner, precision in found["kv_dtype"].items():
        by_precision.setdefault(precision, []).append(int(owner))
    rarest_last = sorted(by_precision.items(), key=lambda item: -len(item[1]))
    owners = "; ".join(f"`{precision}`: {_said(numbers, len(found['kv_dtype']))}" for precision, numbers in rarest_last)
    share = found["bytes"] / found["reference_bytes"]
    note = ", interrupted" if found.get("interrupted") else ""
    return f"| {name} | {found['target_kl']:g}{note} | {owners} | {found['kl']:.1e} | {found['same_top']:.1%} | {share:.1%} |"


def _said(owners: list[int], count: int) -> str:
    return (
        "all"
        if len(owners) == count
        else f"{len(owners)} of {count}"
        if 2 * len(owners) > count
        else f"layers {', '.join(map(str, owners))}"
    )

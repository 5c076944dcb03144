"""Decode steps of families with states, selections and experts are replayed in bfloat16, across what happens at some positions only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from parity import test_deepseek_v3, test_deepseek_v4, test_zaya
from parity.harness import Paged, load, random_ids
from parity.test_gemma4 import tiny_gemma4
from torch import bfloat16

from kvshare import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")


def save_zaya(name: str, directory: Path) -> None:
    test_zaya.oracle_of(**test_zaya.SHAPES[name]).save_pretrained(directory)


def save_v3(name: str, directory: Path) -> None:
    test_deepseek_v3.build(name).save_pretrained(directory)


def save_v4(name: str, directory: Path) -> None:
    test_deepseek_v4.build(**test_deepseek_v4.SHAPES[name]).save_pretrained(directory)


FAMILIES: dict[str, Callable[[Path], object]] = {
    **{f"gemma 4: {name}": partial(tiny_gemma4, name) for name in ("26B-A4B", "31B")},
    **{f"zaya: {name}": partial(save_zaya, name) for name in test_zaya.SHAPES},
    **{f"deepseek {name}": partial(save_v3, name) for name in ("v3", "v3.2")},
    **{f"deepseek v4: {name}": partial(save_v4, name) for name in test_deepseek_v4.SHAPES},
}
FORMS = {**dict.fromkeys(FAMILIES, ("plain",)), "gemma 4: 31B": ("plain", "compact", "v-only")}


@pytest.mark.parametrize(("family", "kv_form"), [(family, form) for family in FAMILIES for form in FORMS[family]])
def test_decode_steps_are_replayed(family: str, kv_form: str, tmp_path: Path) -> None:
    """`Paged.step` asserts that each replay gives the step's own logits and leaves its states, bit for bit."""
    FAMILIES[family](tmp_path)
    model = load(tmp_path, bfloat16, kv_form)
    ids = random_ids(90, sequences=3, tokens=60)
    paged, starts = Paged(model, 3, dtype=bfloat16), (1, 6, 17)
    for sequence, start in enumerate(starts):
        paged.step([ids[sequence, :start]], [sequence])
    for step in range(60 - max(starts)):
        paged.step([ids[sequence, start + step][None] for sequence, start in enumerate(starts)])
    assert not paged.decode_steps.reasons
    assert "steps replayed in" in paged.decode_steps.describe()
    if family.startswith("deepseek") or (kv_form == "plain" and "gemma" in family):
        assert paged.decode_steps.describe() == "decode steps replayed in 1 native call"


@pytest.mark.parametrize("count", [20, 50])
@pytest.mark.parametrize("family", ["gemma 4: 26B-A4B", "zaya: 8B", "deepseek v3.2", "deepseek v4: flash"])
def test_steps_of_many_sequences_are_replayed(family: str, count: int, tmp_path: Path) -> None:
    """With more rows than native products are made for, torch multiplies in between."""
    FAMILIES[family](tmp_path)
    paged, ids = Paged(load(tmp_path, bfloat16), count, dtype=bfloat16), random_ids(90, sequences=count, tokens=12)
    starts = [1 + sequence % 6 for sequence in range(count)]
    paged.step([own[:start] for own, start in zip(ids, starts, strict=True)])
    for step in range(5):
        paged.step([own[start + step][None] for own, start in zip(ids, starts, strict=True)])
    assert not paged.decode_steps.reasons
    assert "steps replayed in" in paged.decode_steps.describe()
    if count == 20 and not family.startswith("zaya") and kernels.isa() in ("amx", "avx512"):  # other sets leave many rows' gates to torch
        assert paged.decode_steps.describe() == "decode steps replayed in 1 native call"

"""Prompts in chunks and single tokens give the same predictions on every instruction set, up to bfloat16's rounding, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.test_native_families import SHAPES, random_model
from parity import test_deepseek_v3, test_deepseek_v4
from parity.harness import chunked, load, random_ids

from kvshare import kernels
from kvshare.kernels.native import ISAS
from kvshare.models.model import Model

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")
CHUNKS = [37, 1, 19, 1, 2]
DEEPSEEK = {"DeepSeek V3": lambda: test_deepseek_v3.build("v3"), "DeepSeek V4": test_deepseek_v4.build}


def tiny(name: str, directory: Path) -> Model:
    if name not in DEEPSEEK:
        return random_model(SHAPES[name])
    DEEPSEEK[name]().save_pretrained(directory)
    return load(directory, torch.bfloat16)


@pytest.mark.parametrize("name", ["Llama, head of its own", "Gemma 3", "Gemma 4 E2B", "Gemma 4 26B-A4B", *DEEPSEEK])
def test_predictions_do_not_depend_on_the_set(name: str, tmp_path: Path) -> None:
    model, ids, found = tiny(name, tmp_path), random_ids(90, tokens=sum(CHUNKS)), {}
    for isa in ISAS:
        with kernels.use_isa(isa) as has:
            if has:
                found[isa] = chunked(model, ids, CHUNKS, torch.bfloat16, "bf16").float().log_softmax(-1)
    for isa, predictions in found.items():
        # of logits with a deviation of 1; experts and entries that are nearly tied flip
        assert (predictions - found["plain"]).abs().mean() < 0.05, isa

"""What a step must read and a prompt compute: counted from the model's structure, held to the planner and to arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from kvshare import LLM, kernels
from kvshare.benchmark.work import PromptFlops, WeightBytes, prompt_flops, step_bytes, weight_bytes
from kvshare.checkpoints.resolve import locate
from kvshare.layout import layout_from_config
from kvshare.models import build_model
from kvshare.planner import plan
from kvshare.planner.models import resolve


@pytest.mark.parametrize("name", ["gemma-4-E2B", "gemma-4-31B", "gemma-3n-E2B-it"])
def test_a_step_reads_the_weights_that_the_planner_counts(name: str) -> None:
    weights = plan(name).weights
    assert weights is not None
    counted = weight_bytes(build_model(resolve(name).config, torch.bfloat16))
    assert counted is not None
    assert counted.whole == weights.bytes


def test_an_embedding_beside_a_head_is_not_read() -> None:
    model = build_model({**tiny.CONFIG, "num_hidden_layers": 2, "tie_word_embeddings": False}, torch.float32)
    whole = sum(parameter.nbytes for parameter in model.parameters()) - tiny.VOCAB * 32 * 4
    assert weight_bytes(model) == WeightBytes(whole, rows=32 * 4)


def test_a_prompt_skips_the_tail() -> None:
    """By hand for Gemma 4 E2B: 15 layers on every row, 20 and the head on one; 8 heads over 512 or 256 numbers."""
    config, context, hidden = resolve("gemma-4-E2B").config, 4096, 1536

    def layer(width: int, owns: bool) -> int:
        attention = 2 * hidden * 8 * width + (2 * hidden * width if owns else 0)
        return attention + 3 * hidden * 6144 * (1 if owns else 2) + 2 * hidden * 256

    owners, tail = 12 * layer(256, True) + 3 * layer(512, True), 16 * layer(256, False) + 4 * layer(512, False)
    rows = owners + 15 * 256 * hidden
    full, window = context * (context + 1) // 2, 512 * 513 // 2 + (context - 512) * 512
    attention = 8 * (3 * 1024 * full + 12 * 512 * window + 4 * 1024 * context + 16 * 512 * 512)
    needed = 2 * (rows * context + tail + 20 * 256 * hidden + 262_144 * hidden + attention)
    # the last owner is a full layer: all but its keys and values, and its own part of the per-layer projection, meet one row
    spared = (layer(512, True) - 2 * hidden * 512 + 256 * hidden) * (context - 1) + 8 * 1024 * (full - context)
    assert prompt_flops(build_model(config, torch.bfloat16), config, context) == PromptFlops(needed, needed - 2 * spared)
    assert needed / context == pytest.approx(1.29e9, rel=0.01)


def test_experts_and_latents_are_not_guessed() -> None:
    for name in ("Laguna-XS.2", "DeepSeek-V3.2"):
        config = resolve(name).config
        model = build_model(config, torch.bfloat16)
        assert weight_bytes(model) is None
        assert prompt_flops(model, config, 512) is None


def test_readers_read_their_owners_rows_again() -> None:
    layout = layout_from_config(resolve("gemma-4-E2B").config)
    full, window = 2 * 512 * 2, 2 * 256 * 2  # bytes of a row
    assert step_bytes(WeightBytes(1000, 10), layout, 4096, 8, "bf16") == 1000 + 80 + 8 * (7 * full * 4096 + 28 * window * 512)


@pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")
def test_quantized_weights_count_as_they_are_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path))
    demo = locate("demo")
    sizes = [weight_bytes(LLM(demo, max_context=64, weights=weights, progress=False).model) for weights in ("bf16", "int8", "int4")]
    plain, int8, int4 = (size.whole for size in sizes if size is not None)
    assert plain > 1.7 * int8 > 2.5 * int4

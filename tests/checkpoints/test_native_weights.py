"""Weights that stay in the blocks of their file give the logits of the widened ones, but for activations rounded to 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints.gguf_writing import CONFIGS, TYPES, quantized, random_model, write_gguf
from parity.harness import WAYS, random_ids

from kvshare import kernels
from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.block_encoding import PRECISIONS
from kvshare.checkpoints.quantized_weights import quantize
from kvshare.checkpoints.weights import load_weights
from kvshare.layers.embedding import Embedding
from kvshare.layers.linear import Linear
from kvshare.layers.quantized_embedding import QuantizedEmbedding
from kvshare.layers.quantized_linear import QuantizedLinear
from kvshare.models import build_model
from kvshare.models.model import Model

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.reason_unavailable()}")


def load(path: Path | str, weights: str) -> Model:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config, torch.float32)
    if weights in PRECISIONS:
        checkpoint = quantize(model, checkpoint, weights, cached=False)
    load_weights(model, checkpoint, torch.float32, keep_blocks=weights != "plain")
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_logits_with_blocks_are_those_of_widened_weights(family: str, kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model(family), quantized(TYPES[kind]))
    blocks, wide = load(path, "native"), load(path, "plain")
    ids = random_ids(CONFIGS[family]["vocab_size"], 2, 41)
    expected = WAYS["one shot"](wide, ids)
    for way in ("one shot", "stepwise", "ragged"):
        got = WAYS[way](blocks, ids)
        relative = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert relative < 2e-3, f"{way}: {relative:.2e}"


def test_no_quantized_layer_is_widened(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("qwen3"), quantized(TYPES.Q8_0))
    model = load(path, "native")
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(QuantizedLinear) == 4 * 4  # qkv, output, gate and up, down of four layers
    assert kinds.count(QuantizedEmbedding) == 1
    assert Linear not in kinds
    assert Embedding not in kinds
    assert all(parameter.ndim == 1 for parameter in model.parameters())  # norms


@pytest.mark.parametrize(("precision", "bound"), [("int8", 1e-3), ("int4", 0.1)])
def test_a_trained_model_quantized_at_load_still_says_nearly_the_same(precision: str, bound: float) -> None:
    text = "In the beginning God created the heaven and the earth. And the earth was without form, and void."
    ids = torch.tensor([open_checkpoint("demo").tokenizer().encode(text)])
    wide, narrow = (WAYS["one shot"](load("demo", weights), ids).log_softmax(-1) for weights in ("plain", precision))
    divergence = (wide.exp() * (wide - narrow)).sum(-1).mean()
    assert 0 < divergence < bound

"""Released configs built on the meta device: as many parameters as the planner counts, as many products as the documentation says."""

from __future__ import annotations

import pytest
import torch

from kvshare.layout.config import text_config
from kvshare.models import MODELS, build_model
from kvshare.planner import plan
from kvshare.planner.models import bundled_names, resolve

RUNNABLE = [name for name in bundled_names() if text_config(resolve(name).config)["model_type"] in MODELS]


@pytest.mark.parametrize("name", RUNNABLE)
def test_parameters_are_those_that_the_planner_counts(name: str) -> None:
    model, weights = build_model(resolve(name).config, torch.bfloat16), plan(name).weights
    assert all(parameter.is_meta for parameter in model.parameters())
    assert weights is not None
    counted = sum(parameter.numel() for parameter in model.parameters())
    biases = 1e-6 * counted  # routers' balancing biases are parameters here, but buffers in transformers, which the planner follows
    assert 0 <= counted - weights.parameters.total <= biases


def test_products_of_a_prompt_token_of_gemma_4_e2b() -> None:
    """Billions of operations in products with weights, head and attention apart: a row whose logits are not needed skips three of four."""
    model = build_model(resolve("gemma-4-E2B").config, torch.bfloat16)

    def products(*modules: torch.nn.Module) -> float:
        return 2e-9 * sum(p.numel() for module in modules for p in module.parameters() if p.ndim == 2)

    last = model.layout.tail - 1
    attention, inputs = model.blocks[last].attention, products(model.per_layer.projection)
    kv = 2e-9 * (attention.qkv.weight.shape[0] - attention.q_size) * model.hidden_size
    assert products(*model.blocks[:last]) + kv + inputs * last / len(model.blocks) == pytest.approx(1.06, abs=0.01)
    assert products(*model.blocks) + inputs == pytest.approx(3.75, abs=0.01)

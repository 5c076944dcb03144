"""ZAYA1: states beside keys and values, and two schemas whose windows count differently."""

from __future__ import annotations

from typing import Any

import pytest

from kvshare.errors import ConfigError
from kvshare.layout import layout_from_config


def native(**changes: Any) -> dict[str, Any]:
    base = {"model_type": "zaya", "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    return {**base, **changes}


def legacy(**changes: Any) -> dict[str, Any]:
    return native(num_hidden_layers=6, cca=True, num_query_groups=2, zaya_mlp_expansion=256, mamba_cache_dtype="float32", **changes)


def test_each_layer_keeps_a_convolution_tail_and_a_delayed_value():
    layer = layout_from_config(native()).layers[0]
    assert layer.kind == "cca"
    assert [(state.name, state.shape, state.dtype) for state in layer.states] == [
        ("conv", ((8 + 2) * 16, 2), "bf16"),
        ("delayed_value", (2 * 16 // 2,), "bf16"),
    ]


def test_longer_convolutions_keep_a_longer_tail():
    assert layout_from_config(native(cca_time0=4, cca_time1=3)).layers[0].states[0].shape == (160, 5)


def test_sliding_layers_keep_a_window():
    layout = layout_from_config(native(layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=9))
    assert [layer.streams[0].window for layer in layout.layers] == [None, 9, None]


def test_the_legacy_schema_counts_attention_and_experts_as_layers():
    layout = layout_from_config(legacy())
    assert len(layout.layers) == 3
    assert "legacy schema" in layout.warnings[0]
    assert {state.dtype for state in layout.layers[0].states} == {"fp32"}


def test_a_legacy_window_does_not_count_the_query_itself():
    assert [layer.streams[0].window for layer in layout_from_config(legacy(swa_layers=[8, 0, 0, 0, 8, 0])).layers] == [9, None, 9]
    assert [layer.streams[0].window for layer in layout_from_config(legacy(sliding_window=8)).layers] == [9, 9, 9]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (native(layer_types=["hybrid", "hybrid_sliding", "hybrid"]), "sliding_window"),
        (native(layer_types=["hybrid", "full_attention", "hybrid"]), "layer_types"),
        (native(sliding_window=9), "layer_types"),
        (native(num_attention_heads=7), "num_key_value_heads"),
        (native(num_key_value_heads=1, num_attention_heads=8, head_dim=15), "head_dim"),
        ({**legacy(), "num_hidden_layers": 5}, "num_hidden_layers"),
        ({**legacy(), "num_query_groups": 4}, "num_query_groups"),
        ({**legacy(), "mamba_cache_dtype": "float8"}, "mamba_cache_dtype"),
        (legacy(swa_layers=[8, 0]), "swa_layers"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field(config: dict[str, Any], field: str):
    with pytest.raises(ConfigError) as caught:
        layout_from_config(config)
    assert caught.value.field == field

"""Grouped-query models: what `sliding_window` means for each, lists of heads, owner maps, configs without a name."""

from __future__ import annotations

from typing import Any

import pytest

from kvshare.errors import ConfigError
from kvshare.layout import layout_from_config
from kvshare.layout.rules import RULES

S, F = "sliding_attention", "full_attention"


def plain(model_type: str | None = "llama", **changes: Any) -> dict[str, Any]:
    base = {"model_type": model_type, "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    return {**base, **changes}


def windows(config: dict[str, Any]) -> list[int | None]:
    return [layer.streams[0].window for layer in layout_from_config(config).layers]


def test_llama_keeps_keys_and_values_in_every_layer():
    layout = layout_from_config(plain())
    assert layout.owner == (0, 1, 2, 3)
    assert {(s.name, s.heads, s.width, s.window) for layer in layout.layers for s in layer.streams} == {
        ("k", 2, 8, None),
        ("v", 2, 8, None),
    }


def test_multi_head_attention_where_no_key_value_heads_are_named():
    config = plain()
    del config["num_key_value_heads"]
    assert layout_from_config(config).layers[0].streams[0].heads == 8


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (plain("mistral", sliding_window=16), [16] * 4),
        (plain("mistral", sliding_window=None), [None] * 4),
        (plain("mixtral", sliding_window=16), [16] * 4),
        (plain("phi3", sliding_window=16), [16] * 4),
        (plain("qwen2", sliding_window=16, use_sliding_window=False, max_window_layers=2), [None] * 4),
        (plain("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=2), [None, None, 16, 16]),
        (plain("qwen3", sliding_window=16, use_sliding_window=True, max_window_layers=1), [None, 16, 16, 16]),
        (plain("qwen3"), [None] * 4),
        (plain("qwen3_moe", sliding_window=16, use_sliding_window=True), [16] * 4),
        (plain("gpt_oss", sliding_window=16), [16, None, 16, None]),
        (plain("olmo3", sliding_window=16), [16, 16, 16, None]),
        (plain("laguna", sliding_window=16), [None] * 4),
        (plain("laguna", sliding_window=16, layer_types=[F, S, S, S]), [None, 16, 16, 16]),
        (plain("llama", sliding_window=16, layer_types=[S, F, S, F]), [16, None, 16, None]),
    ],
)
def test_what_a_window_means_differs_by_architecture(config: dict[str, Any], expected: list[int | None]):
    assert windows(config) == expected


def test_openelm_lists_heads_by_layer_under_names_of_its_own():
    config = {
        "model_type": "openelm",
        "num_transformer_layers": 3,
        "num_query_heads": [12, 12, 20],
        "num_kv_heads": [3, 4, 5],
        "head_dim": 64,
        "max_context_length": 2048,
    }
    layout = layout_from_config(config)
    assert [layer.streams[0].heads for layer in layout.layers] == [3, 4, 5]
    assert layout.max_context == 2048
    assert layout.bytes(10) == 10 * 2 * 2 * 64 * (3 + 4 + 5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sliding_window": 16}, "sliding_window"),
        ({"layer_types": [S, F, S, F]}, "sliding_window"),
        ({"layer_types": [F, F]}, "layer_types"),
        ({"layer_types": [S, F, S, F], "sliding_window": 16, "use_sliding_window": False}, "use_sliding_window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": [2, 2, 2]}, "num_key_value_heads"),
        ({"num_key_value_heads": [2, 0, 2, 2]}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 4.0}, "num_hidden_layers"),
        ({"hidden_size": 63}, "head_dim"),
        ({"model_type": "mamba"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field(changes: dict[str, Any], field: str):
    with pytest.raises(ConfigError) as caught:
        layout_from_config({**plain(), **changes})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_a_window_rule_that_needs_a_layer_number_does_not_guess_it():
    with pytest.raises(ConfigError, match="max_window_layers: missing"):
        layout_from_config(plain("qwen2", sliding_window=16, use_sliding_window=True))


def test_a_plain_config_without_a_name_is_read_and_the_assumption_stated():
    named, unnamed = layout_from_config(plain()), layout_from_config(plain(None))
    assert unnamed.layers == named.layers
    assert len(unnamed.warnings) == 1
    assert "model_type is missing" in unnamed.warnings[0]


@pytest.mark.parametrize("field", ["num_kv_shared_layers", "attention_k_eq_v", "compress_ratios", "cca", "layer_types", "kv_lora_rank"])
def test_a_config_without_a_name_that_is_not_plain_is_refused(field: str):
    with pytest.raises(ConfigError, match=f"model_type: missing, and {field} says") as caught:
        layout_from_config(plain(None, **{field: [1]}))
    assert caught.value.field == "model_type"


def test_a_config_without_name_or_heads_is_refused():
    with pytest.raises(ConfigError, match="model_type: missing, and without num_key_value_heads"):
        layout_from_config({"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64})


class TestOwnerMaps:
    def test_cross_layer_attention_in_pairs(self):
        layout = layout_from_config(plain(kv_sharing=[0, 0, 2, 2]))
        assert layout.owner == (0, 0, 2, 2)
        assert layout.tail == 3
        assert layout.bytes(100) * 2 == layout_from_config(plain()).bytes(100)

    def test_one_owner_for_the_upper_half(self):
        layout = layout_from_config(plain("mistral", sliding_window=16, layer_types=[S, F, F, F], kv_sharing=[0, 1, 1, 1]))
        assert layout.readers(1) == (2, 3)
        assert layout.tail == 2

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"kv_sharing": [0, 2, 2, 3]}, "layer 1 reads layer 2, which runs after it"),
            ({"kv_sharing": [0, 0, 1, 3]}, "layer 2 reads layer 1, which stores nothing but reads layer 0"),
            ({"kv_sharing": [0, 1, 2, 9]}, "layer 3 reads layer 9, but there are layers 0 to 3"),
            ({"kv_sharing": [0, 1, 2, -1]}, "layer 3 reads layer -1"),
            ({"kv_sharing": [0, 1, 2]}, "has 3 entries for 4 layers"),
            ({"kv_sharing": [0, 1, 2, True]}, "not booleans"),
            ({"kv_sharing": "all"}, "must be a list"),
            (
                {"kv_sharing": [0, 0, 2, 2], "num_key_value_heads": [2, 4, 2, 2]},
                "layer 1 .4 heads of 8, all rows. cannot read layer 0 .2 heads of 8",
            ),
            (
                {"kv_sharing": [0, 0, 2, 2], "layer_types": [S, F, F, F], "sliding_window": 16},
                "layer 1 .2 heads of 8, all rows. cannot read layer 0 .2 heads of 8, a window of 16.",
            ),
        ],
    )
    def test_a_map_that_cannot_work_is_refused_with_the_reason(self, changes: dict[str, Any], reason: str):
        with pytest.raises(ConfigError, match=reason) as caught:
            layout_from_config(plain(**changes))
        assert caught.value.field == "kv_sharing"


def test_every_rule_refuses_an_empty_config_with_a_field():
    for model_type in RULES:
        with pytest.raises(ConfigError) as caught:
            layout_from_config({"model_type": model_type})
        assert caught.value.field

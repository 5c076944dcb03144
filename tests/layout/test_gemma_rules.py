"""Gemma's rules: who reads whom, windows, two schemas for widths, keys that equal values, drafters."""

from __future__ import annotations

from typing import Any

import pytest

from kvshare.errors import ConfigError
from kvshare.layout import layout_from_config

S, F = "sliding_attention", "full_attention"


def gemma4(**changes: Any) -> dict[str, Any]:
    base = {
        "model_type": "gemma4_text",
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 10,
        "layer_types": [S, S, F, S, S, F, S, F],
        "num_kv_shared_layers": 3,
    }
    return {**base, **changes}


def test_a_reader_reads_the_last_owner_of_its_own_type_and_not_layer_l_minus_k():
    layout = layout_from_config(gemma4())
    assert layout.owner == (0, 1, 2, 3, 4, 2, 4, 2)
    assert layout.readers(2) == (5, 7)
    assert layout.readers(4) == (6,)
    assert layout.tail == 5


def test_full_layers_are_wider_and_sliding_layers_keep_the_window():
    layout = layout_from_config(gemma4())
    assert [(s.name, s.heads, s.width, s.window) for s in layout.layers[0].streams] == [("k", 2, 16, 10), ("v", 2, 16, 10)]
    assert [(s.name, s.heads, s.width, s.window) for s in layout.layers[2].streams] == [("k", 2, 32, None), ("v", 2, 32, None)]


def test_global_head_counts_apply_only_where_keys_equal_values():
    assert layout_from_config(gemma4(num_global_key_value_heads=1)).layers[2].streams[0].heads == 2
    assert layout_from_config(gemma4(num_global_key_value_heads=1, attention_k_eq_v=True)).layers[2].streams[0].heads == 1


def test_the_schema_that_transformers_saves_gives_the_same_layout():
    saved = gemma4(per_layer_config={str(i): {"head_dim": 32} for i in (2, 5, 7)})
    del saved["global_head_dim"]
    assert layout_from_config(saved) == layout_from_config(gemma4())


def test_transformers_pads_layer_numbers_with_zeros():
    types = [S, F] * 6
    saved = gemma4(num_hidden_layers=12, layer_types=types, per_layer_config={f"{i:02}": {"head_dim": 32} for i in range(1, 12, 2)})
    del saved["global_head_dim"]
    assert [layer.streams[0].width for layer in layout_from_config({**saved, "num_kv_shared_layers": 0}).layers] == [16, 32] * 6


def test_schemas_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"per_layer_config: layer 2 has head_dim 64.* says 32"):
        layout_from_config(gemma4(per_layer_config={"2": {"head_dim": 64}}))


def test_multimodal_configs_nest_the_text_config():
    assert layout_from_config({"model_type": "gemma4", "text_config": gemma4()}) == layout_from_config(gemma4())


@pytest.mark.parametrize(("mode", "window"), [(None, 10), (False, 10), ("vision", 10), ("all", 6)])
def test_attention_in_both_directions_halves_the_window(mode: Any, window: int):
    assert layout_from_config(gemma4(use_bidirectional_attention=mode)).layers[0].streams[0].window == window


def test_gemma3_with_attention_in_both_directions():
    config = {"model_type": "gemma3_text", "num_hidden_layers": 6, "num_key_value_heads": 1, "sliding_window": 512}
    assert layout_from_config({**config, "use_bidirectional_attention": True}).layers[0].streams[0].window == 257
    assert layout_from_config({**config, "use_bidirectional_attention": False}).layers[0].streams[0].window == 512


@pytest.mark.parametrize(("model_type", "period"), [("gemma2", 2), ("gemma3_text", 6), ("gemma3n_text", 5), ("gemma4_text", 6)])
def test_without_a_list_every_nth_layer_is_full(model_type: str, period: int):
    config = gemma4(model_type=model_type, num_hidden_layers=2 * period, num_kv_shared_layers=0)
    del config["layer_types"]
    kinds = [layer.kind for layer in layout_from_config(config).layers]
    assert [index for index, kind in enumerate(kinds) if kind == "full"] == [period - 1, 2 * period - 1]


def test_gemma3_takes_its_period_from_the_config():
    config = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    }
    assert [layer.kind for layer in layout_from_config(config).layers] == ["sliding", "full", "sliding", "full"]


def test_heads_that_gemma3_leaves_to_its_class_are_assumed_aloud():
    layout = layout_from_config({"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 1024})
    assert layout.layers[0].streams[0].heads == 4
    assert layout.warnings == ("num_key_value_heads is missing: assumed 4 (the default of this architecture's configuration class)",)


def test_gemma4_ends_in_a_full_layer():
    layout = layout_from_config(gemma4(layer_types=[S, S, F, S, S, F, S, S]))
    assert layout.layers[7].kind == "full"
    assert "layer_types ends in a sliding layer" in layout.warnings[0]


@pytest.mark.parametrize(
    ("form", "streams"), [("plain", {"k": 32, "v": 32}), ("compact", {"v": 32, "k_rotated": 8}), ("v-only", {"v": 32})]
)
def test_forms_of_keys_that_equal_values(form: str, streams: dict[str, int]):
    layout = layout_from_config(gemma4(attention_k_eq_v=True), form)
    assert {stream.name: stream.width for stream in layout.layers[2].streams} == streams
    assert {stream.name: stream.width for stream in layout.layers[0].streams} == {"k": 16, "v": 16}  # sliding layers project both


def test_forms_change_nothing_where_keys_are_projected():
    assert layout_from_config(gemma4(), "v-only") == layout_from_config(gemma4())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 6, "layer_types": [S, S, F, S, S, F, S, F]}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
        ({"layer_types": [S, F]}, "layer_types"),
        ({"layer_types": [S, S, F, S, S, F, S, "chunked_attention"]}, "layer_types"),
        ({"sliding_window": None}, "sliding_window"),
        ({"sliding_window": "512"}, "sliding_window"),
        ({"use_bidirectional_attention": "some"}, "use_bidirectional_attention"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"head_dim": True}, "head_dim"),
        ({"per_layer_config": [1, 2]}, "per_layer_config"),
        ({"per_layer_config": {"2": {"head_dim": 0}}, "global_head_dim": None}, "head_dim"),
        ({"model_type": "gemma5_text"}, "model_type"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field(changes: dict[str, Any], field: str):
    with pytest.raises(ConfigError) as caught:
        layout_from_config(gemma4(**changes))
    assert caught.value.field == field


def test_gemma3n_must_say_how_many_layers_share():
    """The configuration class would fill in 15, and one of the two released models has 10."""
    config = gemma4(model_type="gemma3n_text")
    del config["num_kv_shared_layers"]
    with pytest.raises(ConfigError, match="num_kv_shared_layers: missing"):
        layout_from_config(config)


def test_an_owner_map_of_ones_own():
    layout = layout_from_config(gemma4(num_kv_shared_layers=0, kv_sharing=[0, 0, 2, 0, 4, 2, 4, 7]))
    assert layout.owner == (0, 0, 2, 0, 4, 2, 4, 7)


def test_a_map_that_contradicts_the_number_of_sharing_layers_is_refused():
    with pytest.raises(ConfigError, match="kv_sharing: contradicts num_kv_shared_layers 3"):
        layout_from_config(gemma4(kv_sharing=[0, 1, 2, 3, 4, 5, 6, 7]))
    assert layout_from_config(gemma4(kv_sharing=[0, 1, 2, 3, 4, 2, 4, 2])) == layout_from_config(gemma4())


def test_a_drafter_owns_nothing_and_reads_the_targets_last_owners():
    drafter = layout_from_config({"model_type": "gemma4_assistant", "text_config": {"model_type": "gemma4_text", "num_hidden_layers": 4}})
    assert drafter.external
    assert [layer.kind for layer in drafter.layers] == ["sliding", "sliding", "sliding", "full"]
    assert drafter.owners == ()
    assert drafter.tail == 0
    assert drafter.bytes(1000) == drafter.held_bytes(1000) == drafter.peak_bytes(1000) == drafter.read_bytes(1000) == 0
    target = layout_from_config(gemma4())
    assert {kind: target.last_owner(kind) for kind in ("sliding", "full")} == {"sliding": 4, "full": 2}
    with pytest.raises(ConfigError, match="num_kv_shared_layers: 2 of 4"):
        layout_from_config({"model_type": "gemma4_assistant", "text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2}})

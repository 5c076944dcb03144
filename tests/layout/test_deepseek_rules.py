"""DeepSeek: latents, windows beside compressed entries, and entries that other layers read."""

from __future__ import annotations

from typing import Any

import pytest

from kvshare.errors import ConfigError
from kvshare.layout import CacheLayout, LayerCache, Stream, layout_from_config


def v3(**changes: Any) -> dict[str, Any]:
    return {"model_type": "deepseek_v3", "num_hidden_layers": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64, **changes}


def v4(**changes: Any) -> dict[str, Any]:
    base = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 4,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "sliding_window": 128,
        "compress_ratios": [0, 128, 4, 128, 0],
    }
    return {**base, **changes}


def v41(**changes: Any) -> dict[str, Any]:
    base = {
        "model_type": "deepseek_v41_text",
        "num_hidden_layers": 8,
        "head_dim": 512,
        "index_head_dim": 128,
        "index_topk": 512,
        "sliding_window": 128,
        "compress_ratios": [0, 2, 2, 2, 1, 1, 1, 1],
        "kv_source_layer_ids": [1, 4],
        "index_source_layer_ids": [1, 4, 6],
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 100,
        "candidate_block_size": 8,
    }
    return {**base, **changes}


def test_v3_keeps_one_latent_for_all_heads():
    assert [(s.name, s.heads, s.width, s.top_k) for s in layout_from_config(v3()).layers[0].streams] == [("latent", 1, 576, None)]


def test_v32_adds_indexer_keys_and_reads_what_they_select():
    layout = layout_from_config(v3(model_type="deepseek_v32", index_head_dim=128, index_topk=2048))
    assert [(s.name, s.width, s.top_k) for s in layout.layers[0].streams] == [("latent", 576, 2048), ("index", 128, None)]
    assert layout.read_bytes(10_000) == 2 * (2048 * 576 + 10_000 * 128) * 2
    assert layout.bytes(1, precision="native") == 2 * (656 + 132)


def test_v32_without_a_name_is_known_by_its_fields_and_says_so():
    config = v3(index_head_dim=128, index_topk=2048)
    del config["model_type"]
    layout = layout_from_config(config)
    assert layout.model_type == "deepseek_v32"
    assert "model_type is missing" in layout.warnings[0]


def test_v4_keeps_a_window_and_entries():
    layout = layout_from_config(v4())
    assert [layer.kind for layer in layout.layers] == ["swa", "hca", "csa", "hca"]
    assert [(s.name, s.width, s.tokens_per_row, s.window) for s in layout.layers[2].streams] == [
        ("kv", 512, 1, 128),
        ("entry", 512, 4, None),
        ("index", 128, 4, None),
    ]
    assert [(s.name, s.tokens_per_row, s.top_k) for s in layout.layers[1].streams] == [("kv", 1, None), ("entry", 128, None)]


def test_v4_open_blocks_are_allocated_whole():
    layout = layout_from_config(v4())
    shapes = {state.name: state.shape for state in layout.layers[2].states}
    assert shapes == {"open_kv": (8, 1024), "open_gate": (8, 1024), "open_index_kv": (8, 256), "open_index_gate": (8, 256)}
    assert {state.name: state.shape for state in layout.layers[1].states} == {"open_kv": (128, 512), "open_gate": (128, 512)}
    assert [sum(state.num_bytes for state in layer.states) for layer in layout.layers] == [0, 524_288, 81_920, 524_288]


@pytest.mark.parametrize(("tokens", "csa", "hca"), [(3, 0, 0), (4, 1, 0), (127, 31, 0), (128, 32, 1), (255, 63, 1), (256, 64, 2)])
def test_v4_entries_appear_when_their_block_is_complete(tokens: int, csa: int, hca: int):
    layers = layout_from_config(v4()).layers
    assert layers[2].stream("entry").live_rows(tokens) == layers[2].stream("index").live_rows(tokens) == csa
    assert layers[1].stream("entry").live_rows(tokens) == hca


def test_v4_native_rows():
    layers = layout_from_config(v4()).layers
    assert [stream.native_bytes for stream in layers[2].streams] == [584, 584, 68]


def test_v4_reads_the_entries_that_the_indexer_selects_and_every_indexer_key():
    layer = layout_from_config(v4(num_hidden_layers=1, compress_ratios=[4]))
    tokens = 100_000
    assert layer.read_bytes(tokens) == (128 + 512) * 1024 + tokens // 4 * 256


def test_v4_schema_that_transformers_saves():
    names = ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    saved = v4(layer_types=names, compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128})
    del saved["compress_ratios"]
    assert layout_from_config(saved) == layout_from_config(v4())


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({k: v for k, v in v4().items() if k != "compress_ratios"}, "compress_ratios"),
        (v4(compress_ratios=[0, 128, 4]), "compress_ratios"),
        (v4(compress_ratios=[0, 128, 4, 128, 4]), "compress_ratios"),
        (v4(compress_ratios=[0, 128, 8, 128]), "compress_ratios"),
        (v4(layer_types=["sliding_attention"] * 4), "layer_types"),
        (v4(num_key_value_heads=2), "num_key_value_heads"),
        (v4(index_topk=None), "index_topk"),
        (v3(model_type="deepseek_v32"), "index_head_dim"),
        (v41(kv_source_layer_ids=[2, 4], index_source_layer_ids=[2, 4, 6]), "compress_ratios"),
        (v41(kv_source_layer_ids=[1, 9]), "kv_source_layer_ids"),
        (v41(kv_source_layer_ids=[1]), "compress_ratios"),
        (v41(index_source_layer_ids=[1, 6]), "index_source_layer_ids"),
        (v41(index_source_layer_ids=None), "index_source_layer_ids"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field(config: dict[str, Any], field: str):
    with pytest.raises(ConfigError) as caught:
        layout_from_config(config)
    assert caught.value.field == field


class TestEntriesOfOtherLayers:
    layout = layout_from_config(v41())

    def test_every_layer_keeps_a_window_and_only_sources_keep_entries(self):
        stored = [[stream.name for stream in layer.streams] for layer in self.layout.layers]
        source = ["kv", "entry", "index"]
        assert stored == [["kv"], source, ["kv"], ["kv"], source, ["kv"], ["kv"], ["kv"]]

    def test_the_others_read_the_last_source_before_them(self):
        read = [[(source, stream.name) for source, stream in layer.borrowed] for layer in self.layout.layers]
        assert read == [[], [], [(1, "entry")], [(1, "entry")], [], [(4, "entry")], [(4, "entry"), (4, "index")], [(4, "entry")]]

    def test_only_a_ratio_above_one_leaves_a_block_open(self):
        assert [[state.shape for state in layer.states] for layer in self.layout.layers][1] == [(2, 512), (2, 512)]
        assert self.layout.layers[4].states == ()

    def test_a_late_indexer_scores_candidates_only(self):
        keys = [stream.top_k for stream in self.layout.streams_of(6) if stream.name == "index"]
        assert keys == [800]
        assert self.layout.layers[4].stream("index").top_k is None

    def test_native_rows_are_four_bit(self):
        layer = self.layout.layers[4]
        assert [stream.native_bytes for stream in layer.streams] == [528, 288, 68]

    def test_without_sharing_every_layer_stores_what_it_reads(self):
        unshared = self.layout.without_sharing()
        assert [sorted(stream.name for stream in layer.streams) for layer in unshared.layers][6] == ["entry", "index", "kv"]
        assert unshared.read_bytes(5000) == self.layout.read_bytes(5000)

    def test_what_is_borrowed_must_be_stored_before(self):
        entry = Stream("entry", 1, 8, 2)
        with pytest.raises(ConfigError, match="layer 0 reads 'entry' of layer 1"):
            CacheLayout((LayerCache("csa2", 0, borrowed=((1, entry),)), LayerCache("csa2", 1, (entry,))))
        with pytest.raises(ConfigError, match="layer 1 reads 'entry' of layer 0"):
            CacheLayout((LayerCache("csa2", 0, (Stream("entry", 1, 8, 4),)), LayerCache("csa2", 1, borrowed=((0, entry),))))

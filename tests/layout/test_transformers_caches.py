"""An independent count: transformers runs a small model of each family, and what its cache then holds is measured.

Its window layers keep one row less between steps (the window without the query to come), V4's plain window layers keep keys and
values apart though they are the same, and its open blocks hold only what they need so far where kvshare allocates them whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layout.families import FAMILIES, V4
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from kvshare.layout import CacheLayout, layout_from_config

TOKENS = 150  # past every window, past a block of 128, inside a block of 4


def cache_of(model_type: str, config: dict[str, Any]) -> list[Any]:
    """transformers' cache layers after a prompt and one more token, in fp32."""
    torch.manual_seed(0)
    built = CONFIG_MAPPING[model_type](**config)
    model = AutoModelForCausalLM.from_config(built, attn_implementation="eager").eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    cache = DynamicCache(config=built)
    tokens = torch.randint(3, 64, (1, TOKENS))
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache, use_cache=True)
        model(tokens[:, -1:], past_key_values=cache, use_cache=True)
    return cache.layers


def tensors(holder: Any) -> list[torch.Tensor]:
    """Every tensor with numbers in a cache layer, in dicts too; views of one storage once."""
    found: dict[int, torch.Tensor] = {}
    for value in vars(holder).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                found[tensor.data_ptr()] = tensor
    return list(found.values())


def as_transformers_counts(layout: CacheLayout) -> CacheLayout:
    """The layout with windows of one row less, and states in fp32 like the model under test."""
    layers = tuple(
        replace(
            layer,
            streams=tuple(replace(s, window=s.window and s.window - 1) for s in layer.streams),
            states=tuple(replace(state, dtype="fp32") for state in layer.states),
        )
        for layer in layout.layers
    )
    return replace(layout, layers=layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_holds_is_what_the_layout_says(name: str):
    model_type, config = FAMILIES[name]
    layout = as_transformers_counts(layout_from_config({"model_type": model_type, **config}))
    held = [sum(tensor.numel() * tensor.element_size() for tensor in tensors(layer)) for layer in cache_of(model_type, config)]
    held += [0] * (len(layout.layers) - len(held))  # trailing readers may have no cache layer at all
    expected = [
        sum(stream.live_rows(TOKENS) * 4 * stream.heads * stream.width for stream in layer.streams)
        + sum(state.num_bytes for state in layer.states)
        for layer in layout.layers
    ]
    assert held == expected
    assert sum(held) == layout.bytes(TOKENS, 1, "fp32")


def test_deepseek_v4_rows_entries_and_open_blocks():
    layout = layout_from_config({"model_type": "deepseek_v4", **V4})
    for layer, theirs in zip(layout.layers, cache_of("deepseek_v4", V4), strict=True):
        assert theirs.keys.shape[-2:] == (layer.stream("kv").live_rows(TOKENS) - 1, layer.stream("kv").width)
        if layer.kind == "swa":
            continue
        entries = {"compressor": "entry", "indexer": "index"}
        assert {entries[part]: tuple(rows.shape[-2:]) for part, rows in theirs.compressed_kv.items()} == {
            stream.name: (stream.live_rows(TOKENS), stream.width) for stream in layer.streams if stream.name != "kv"
        }
        room = {state.name: state.shape for state in layer.states}
        for part, prefix in (("compressor", "open"), ("indexer", "open_index")):
            if part in theirs.buffer_kv:
                rows, width = theirs.buffer_kv[part].shape[-2:]
                assert rows == TOKENS % layer.streams[1].tokens_per_row
                assert rows < room[f"{prefix}_kv"][0]
                assert width == room[f"{prefix}_kv"][1]
                assert theirs.buffer_gate[part].shape[-2:] == (rows, room[f"{prefix}_gate"][1])

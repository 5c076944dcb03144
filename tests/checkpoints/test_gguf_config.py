"""Metadata of any content gives a config or is refused by the key at fault; nothing it says makes the reader crash or allocate."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from checkpoints.gguf_writing import CONFIGS, random_model, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare.checkpoints.gguf_config import config_from_header
from kvshare.checkpoints.gguf_header import GGUFHeader, read_header
from kvshare.errors import ConfigError

JUNK = [
    None,
    "",
    "text",
    True,
    0,
    -1,
    1,
    3,
    1 << 63,
    10**9,
    0.0,
    -1.5,
    math.nan,
    math.inf,
    [],
    [1],
    [True] * 6,
    [0.5] * 6,
    ["a"] * 6,
    [-1] * 6,
    [[1]],
]


@cache
def header_of(family: str) -> GGUFHeader:
    with TemporaryDirectory() as directory:
        header = read_header(write_gguf(Path(directory) / "model.gguf", random_model(family)))
    # the file is gone: the one tensor that is read with the config must not be needed again
    return replace(header, tensors={name: info for name, info in header.tensors.items() if name != "rope_freqs.weight"})


@settings(max_examples=400, deadline=None)
@given(family=st.sampled_from(sorted(CONFIGS)), data=st.data())
def test_junk_in_any_key_is_refused_or_makes_a_config(family: str, data: st.DataObject):
    header = header_of(family)
    keys = sorted(key for key in header.metadata if not key.startswith(("GGUF.", "general.")))
    changes: dict[str, Any] = {
        key: data.draw(st.sampled_from(JUNK)) for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3))
    }
    try:
        config = config_from_header(replace(header, metadata={**header.metadata, **changes}))
    except ConfigError:
        return
    assert config["num_hidden_layers"] <= len(header.tensors)


def refusal(header: GGUFHeader, metadata: dict[str, Any]) -> str:
    """What is said about a header with this metadata; "" where nothing is."""
    try:
        config_from_header(replace(header, metadata=metadata))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", CONFIGS)
def test_every_key_that_is_needed_is_named_when_it_is_missing(family: str):
    header = header_of(family)
    needed = 0
    for key in header.metadata.keys() - {"gemma4.attention.shared_kv_layers"}:  # without it the widths contradict each other
        said = refusal(header, {name: value for name, value in header.metadata.items() if name != key})
        assert not said or key.split(".", 1)[1] in said
        needed += bool(said)
    assert needed >= 6


def test_more_layers_than_the_file_can_hold_are_refused():
    header = header_of("llama")
    with pytest.raises(ConfigError, match=r"block_count: is 1000000000000, but the file holds only \d+ tensors"):
        config_from_header(replace(header, metadata={**header.metadata, "llama.block_count": 10**12}))


def test_a_shared_width_that_is_neither_equal_nor_double_is_refused():
    header = header_of("gemma4_text")
    with pytest.raises(ConfigError, match="feed_forward_length: is 96 in owning layers and 100 in sharing ones"):
        config_from_header(replace(header, metadata={**header.metadata, "gemma4.feed_forward_length": [96] * 4 + [100] * 2}))

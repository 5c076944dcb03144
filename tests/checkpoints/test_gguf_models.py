"""A GGUF file gives the config, the numbers and the logits of the Hugging Face model that it was made of."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints.gguf_writing import CONFIGS, TYPES, quantized, random_model, write_gguf
from parity.harness import load, random_ids
from torch import Tensor

from kvshare.cache.step import DenseStep
from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_config import config_from_gguf
from kvshare.errors import CheckpointError, ConfigError
from kvshare.layout import layout_from_config
from kvshare.models.model import Model

BLOCK_TYPES = [TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q8_0, TYPES.Q4_K, TYPES.Q5_K, TYPES.Q6_K, TYPES.F16, TYPES.BF16]


@torch.no_grad()
def _logits(model: Model, tokens: Tensor) -> Tensor:  # [tokens] -> [tokens, vocab_size]
    return model.logits(model(tokens, DenseStep(model.layout, [len(tokens)])))


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_is_the_models_own(family: str, tmp_path: Path):
    model = random_model(family)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model))
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    assert checkpoint.names() == expected.keys()
    assert checkpoint.skipped == ()
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape), name
        # a norm to which 1 was added and taken away again is off by one rounding
        torch.testing.assert_close(checkpoint.get(name), tensor, rtol=0, atol=2e-7 if "norm" in name else 0)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_cache_is_planned_as_from_config_json(family: str, tmp_path: Path):
    model = random_model(family)
    model.save_pretrained(tmp_path)
    from_gguf = layout_from_config(config_from_gguf(write_gguf(tmp_path / "model.gguf", model)))
    assert from_gguf.layers == layout_from_config(open_checkpoint(tmp_path).config).layers


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_directory(family: str, tmp_path: Path):
    model = random_model(family)
    model.save_pretrained(tmp_path / "directory")
    write_gguf(tmp_path / "model.gguf", model)
    tokens = random_ids(CONFIGS[family]["vocab_size"], 1, 40)[0]
    logits = []
    for where in (tmp_path / "directory", tmp_path / "model.gguf"):
        logits.append(_logits(load(where), tokens))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text, experts"])
def test_quantized_tensors_are_what_the_gguf_package_decodes(family: str, kind: gguf.GGMLQuantizationType, tmp_path: Path):
    layer_types = {"layer_types": CONFIGS[family]["layer_types"][:2]} if "layer_types" in CONFIGS[family] else {}
    model = random_model(family, hidden_size=256, intermediate_size=256, num_hidden_layers=2, **layer_types)
    path = write_gguf(tmp_path / "model.gguf", model, quantized(kind))
    decoded = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    checkpoint = open_checkpoint(path)
    pairs = {"token_embd.weight": "model.embed_tokens.weight", "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight"}
    pairs |= {f"blk.1.attn_{part}.weight": f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk"}
    if "experts" in family:
        pairs["blk.1.ffn_gate_up_exps.weight"] = "model.layers.1.experts.gate_up_proj"
    for theirs, ours in pairs.items():
        expected = decoded[theirs]
        if family == "llama" and "attn" in theirs:
            heads = 4 if "attn_q" in theirs else 2
            expected = expected.reshape(heads, -1, 2, expected.shape[-1]).swapaxes(1, 2).reshape(expected.shape)
        assert np.array_equal(checkpoint.get(ours, torch.float32).numpy(), expected), ours
        assert torch.equal(checkpoint.get(ours, torch.bfloat16), torch.from_numpy(expected.copy()).bfloat16()), ours
        packed = checkpoint.packed(ours)
        assert (packed is None) == (kind in (TYPES.F16, TYPES.BF16)), ours
        if packed is not None:
            assert packed.type.name == kind.name
            assert packed.shape == checkpoint.shape(ours)


def test_blocks_are_views_of_the_mapped_file(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", random_model("gemma3_text"), quantized(TYPES.Q8_0))
    checkpoint = open_checkpoint(path)
    packed = [checkpoint.packed(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(2)]
    assert all(packed)
    assert len({each.blocks.untyped_storage().data_ptr() for each in packed if each}) == 1
    assert packed[0].blocks.untyped_storage().nbytes() == path.stat().st_size  # type: ignore[union-attr]


def test_a_quantized_per_layer_table_stays_packed_and_gives_the_decoded_rows(tmp_path: Path):
    model = random_model("gemma4_text")
    path = write_gguf(tmp_path / "model.gguf", model, quantized(TYPES.Q4_0))
    tokens = random_ids(96, 1, 12)[0]
    packed = load(path)
    assert isinstance(packed.per_layer.table, PackedBlocks)
    unpacked = load(path)
    unpacked.per_layer.table = packed.per_layer.table.dequantize()
    assert torch.equal(_logits(packed, tokens), _logits(unpacked, tokens))


def test_llama3_stretching_is_read_from_the_divisors(tmp_path: Path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama", rope_parameters=rope, head_dim=64)
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    model.register_buffer("rope_freqs", torch.from_numpy(divisors))
    assert config_from_gguf(write_gguf(tmp_path / "model.gguf", model))["rope_parameters"] == rope

    model.rope_freqs[3] = 2.5
    with pytest.raises(ConfigError, match="rope_freqs"):
        config_from_gguf(write_gguf(tmp_path / "odd.gguf", model))


def test_an_older_file_without_the_sliding_base_and_pattern_gets_gemma3s(tmp_path: Path):
    config = config_from_gguf(write_gguf(tmp_path / "model.gguf", random_model("gemma3_text")))
    assert config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) + ["sliding_attention"]
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama__rope__scaling__type": "longrope"}, "rope.scaling.type"),
        ({"llama__expert_count": 8}, "expert_count"),
    ],
)
def test_what_does_not_load_is_refused_by_its_key(metadata: dict[str, object], message: str, tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), **metadata)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(path)


def test_one_part_of_a_split_file_is_refused_with_the_remedy(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), split__count=3)
    with pytest.raises(CheckpointError, match="llama-gguf-split --merge"):
        open_checkpoint(path)


def test_an_unknown_architecture_is_refused_with_those_that_load(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "clip")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"'clip' does not load from GGUF; known are gemma3, "):
        open_checkpoint(tmp_path / "model.gguf")

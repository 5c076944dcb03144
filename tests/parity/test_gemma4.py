"""Gemma 4 in all its shapes equals transformers' logits in every way of running, and steps into none of the traps that others found."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.harness import (
    Paged,
    assert_equals_oracle,
    greedy,
    last_rows_only,
    load,
    one_shot,
    oracle_greedy,
    oracle_logits,
    random_ids,
    randomise,
)
from safetensors.torch import load_file, save_file

from kvshare.cache.step import DenseStep
from kvshare.errors import ConfigError
from kvshare.layers.rotary import frequencies

S, F = "sliding_attention", "full_attention"
VOCAB = 160
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
KEY_IS_VALUE = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
SHAPES: dict[str, dict[str, Any]] = {
    "E2B": {
        "num_hidden_layers": 15,
        "num_key_value_heads": 1,
        "layer_types": ([S] * 4 + [F]) * 3,
        "num_kv_shared_layers": 8,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
    },
    "E4B": {
        "num_hidden_layers": 12,
        "num_key_value_heads": 2,
        "layer_types": ([S] * 3 + [F]) * 3,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 8,
        "attention_bias": True,
    },
    "26B-A4B": {
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "layer_types": ([S] * 2 + [F]) * 2,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        **KEY_IS_VALUE,
    },
    "31B": {
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "layer_types": ([S] * 2 + [F]) * 2,
        **KEY_IS_VALUE,
    },
}


def tiny_gemma4(name: str, directory: Path, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a released shape, saved to `directory`."""
    config = transformers.Gemma4TextConfig(**{**BASE, **SHAPES[name], **changes})
    oracle = randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    oracle.save_pretrained(directory)
    return oracle


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = tiny_gemma4(name, tmp_path)
    ids = random_ids(VOCAB)
    assert_equals_oracle(load(tmp_path), oracle_logits(oracle, ids), ids)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_equal_generate(name: str, tmp_path: Path) -> None:
    oracle = tiny_gemma4(name, tmp_path)
    prompts = random_ids(VOCAB, tokens=20)
    assert torch.equal(greedy(load(tmp_path), prompts, 16), oracle_greedy(oracle, prompts, 16))


def edit_config(directory: Path, **changes: Any) -> None:
    """Set fields of a saved config; None removes one."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("name", ["E2B", "26B-A4B"])
def test_released_and_saved_schemas_of_widths_are_one_model(name: str, tmp_path: Path) -> None:
    """Released configs say `global_head_dim` and `num_global_key_value_heads`, those that transformers saves `per_layer_config`."""
    tiny_gemma4(name, tmp_path)
    ids = random_ids(VOCAB)
    saved = one_shot(load(tmp_path), ids)
    assert json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    heads = SHAPES[name].get("num_global_key_value_heads")
    edit_config(tmp_path, per_layer_config=None, global_head_dim=32, num_global_key_value_heads=heads)
    assert torch.equal(one_shot(load(tmp_path), ids), saved)


def test_multimodal_checkpoint_loads_its_language_model(tmp_path: Path) -> None:
    """transformers' `Gemma4ForCausalLM.from_pretrained` finds none of these names and loads nothing, silently."""
    tiny_gemma4("E2B", tmp_path)
    ids = random_ids(VOCAB)
    plain = one_shot(load(tmp_path), ids)
    weights = {
        name.replace("model.", "model.language_model.", 1): value for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    weights["model.vision_tower.patch_embedder.weight"] = torch.full((3, 3), float("nan"))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": text, "vision_config": {"hidden_size": 8}}))
    assert torch.equal(one_shot(load(tmp_path), ids), plain)


def test_dead_keys_and_values_of_readers_are_never_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Released checkpoints ship k and v tensors for layers that have none; here they hold what no model survives."""
    tiny_gemma4("E2B", tmp_path)
    ids = random_ids(VOCAB)
    plain = one_shot(load(tmp_path), ids)
    weights = load_file(tmp_path / "model.safetensors")
    for index in range(7, 15):
        for part in ("k_proj", "v_proj", "k_norm"):
            assert f"model.layers.{index}.self_attn.{part}.weight" not in weights
            weights[f"model.layers.{index}.self_attn.{part}.weight"] = torch.full((5,), float("nan"))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        assert torch.equal(one_shot(load(tmp_path), ids), plain)
    assert not caplog.records


def test_only_readers_are_double_wide(tmp_path: Path) -> None:
    tiny_gemma4("E2B", tmp_path)
    model = load(tmp_path)
    widths = [block.feed_forward.mlp.down.weight.shape[1] for block in model.blocks]
    assert widths == [96] * 7 + [192] * 8


def test_proportional_rotation_is_not_a_partial_one() -> None:
    """A quarter of the pairs moves, with the frequencies of the whole width, and partners lie half a head apart."""
    rope = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    table = frequencies(rope, 512)
    expected = torch.tensor([1e6 ** (-2 * i / 512) for i in range(64)])
    torch.testing.assert_close(table.inverse[:64], expected)
    assert not table.inverse[64:].any()
    x = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0))
    moved = (table.at(torch.tensor([5]), torch.float32).half_split(x) != x)[0, 0].nonzero().flatten().tolist()
    assert moved == [*range(64), *range(256, 320)]


def test_integer_softcap_and_no_softcap(tmp_path: Path) -> None:
    tiny_gemma4("31B", tmp_path)
    ids = random_ids(VOCAB)
    capped = one_shot(load(tmp_path), ids)
    edit_config(tmp_path, final_logit_softcapping=30)
    assert torch.equal(one_shot(load(tmp_path), ids), capped)
    edit_config(tmp_path, final_logit_softcapping=None)
    torch.testing.assert_close(torch.tanh(one_shot(load(tmp_path), ids) / 30) * 30, capped)


def test_unified_text_model_is_gemma_4(tmp_path: Path) -> None:
    """The 12B calls itself `gemma4_unified`; its language model is the 31B's in small."""
    tiny_gemma4("31B", tmp_path)
    ids = random_ids(VOCAB)
    plain = one_shot(load(tmp_path), ids)
    edit_config(tmp_path, model_type="gemma4_unified_text")
    assert torch.equal(one_shot(load(tmp_path), ids), plain)


def test_untied_head_is_loaded(tmp_path: Path) -> None:
    oracle = tiny_gemma4("31B", tmp_path, tie_word_embeddings=False)
    ids = random_ids(VOCAB)
    torch.testing.assert_close(one_shot(load(tmp_path), ids), oracle_logits(oracle, ids), atol=2e-4, rtol=0)


def test_encoder_is_refused(tmp_path: Path) -> None:
    tiny_gemma4("31B", tmp_path)
    edit_config(tmp_path, use_bidirectional_attention="all")
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        load(tmp_path)


def test_tail_runs_on_the_rows_that_are_asked_for_and_is_exact(tmp_path: Path) -> None:
    """Rows, also several and in the middle, come out as if all had run; the layers behind the last owner see no others."""
    tiny_gemma4("E2B", tmp_path)
    model, ids = load(tmp_path), random_ids(VOCAB)
    everything = one_shot(model, ids).flatten(0, 1)
    seen: list[int] = []
    hooks = [block.feed_forward.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0]))) for block in model.blocks]
    keep = [3, 11, 12, 40, 41, 80]
    kept = Paged(model, 2).step(list(ids), keep=keep)
    torch.testing.assert_close(kept, everything[keep], atol=2e-5, rtol=0)
    assert seen == [82] * 6 + [6] * 9  # the last owner, layer 6, owes only its keys and values to the other rows
    seen.clear()
    assert len(Paged(model, 2).step(list(ids), keep=[])) == 0
    assert seen == [82] * 6
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(last_rows_only(model, ids, 7), everything[[40, 81]], atol=2e-5, rtol=0)


def test_sharing_does_not_depend_on_a_cache(tmp_path: Path) -> None:
    """Readers find their owner's rows in a step without an arena just as in one with pages."""
    tiny_gemma4("E4B", tmp_path)
    model, ids = load(tmp_path), random_ids(VOCAB, sequences=3)
    with torch.no_grad():
        dense = model.logits(model(ids.flatten(), DenseStep(model.layout, [41] * 3)))
    torch.testing.assert_close(Paged(model, 3).step(list(ids)), dense, atol=2e-5, rtol=0)


def test_per_layer_table_stays_a_view_of_the_file(tmp_path: Path) -> None:
    """Whatever the model computes in: rows are cast after they were gathered."""
    oracle = tiny_gemma4("E2B", tmp_path)
    ids = random_ids(VOCAB)
    model = load(tmp_path, torch.bfloat16)
    assert model.per_layer.table.dtype == torch.float32
    assert {p.dtype for name, p in model.named_parameters() if name != "per_layer.table"} == {torch.bfloat16}
    with torch.no_grad():
        model.per_layer.projection.weight = torch.nn.Parameter(torch.zeros_like(model.per_layer.projection.weight))
        inputs = model.per_layer(ids[0], model.embed(ids[0]), 0, 15)  # what is left is the table's part
        expected = oracle.to(torch.bfloat16).model.get_per_layer_inputs(ids[0], None)
    assert torch.equal(inputs.values, expected * 2**-0.5)


def test_gradients_of_owners_come_through_their_readers_too(tmp_path: Path) -> None:
    oracle = tiny_gemma4("E2B", tmp_path)
    model, ids = load(tmp_path).requires_grad_(True), random_ids(VOCAB)
    weigh = torch.randn(41, VOCAB, generator=torch.Generator().manual_seed(0))
    (model.logits(model(ids[0], DenseStep(model.layout, [41]))) * weigh).sum().backward()
    (oracle(input_ids=ids[:1], use_cache=False).logits[0] * weigh).sum().backward()
    for owner in (4, 6):
        expected = oracle.model.layers[owner].self_attn.k_norm.weight.grad
        torch.testing.assert_close(
            model.blocks[owner].attention.k_norm.weight.grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
        )

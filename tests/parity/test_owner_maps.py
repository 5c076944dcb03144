"""Owner maps (CLA, YOCO, learned ones) on ordinary models equal a reference in plain torch, which without a map equals transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.harness import Paged, assert_equals_oracle, load, oracle_logits, random_ids, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from kvshare.errors import CheckpointError, ConfigError
from kvshare.layout import KV_FORMS, layout_from_config
from kvshare.models import build_model
from kvshare.planner.models import resolve

LAYERS, WINDOW = 6, 9
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SLIDING, FULL = "sliding_attention", "full_attention"
YOCO_TYPES = [SLIDING, SLIDING, SLIDING, FULL, FULL, FULL]
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen3 with windows": (
        transformers.Qwen3Config,
        {"layer_types": YOCO_TYPES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW}),
}
OTHERS: dict[str, tuple[type, dict[str, Any], list[int]]] = {
    "laguna": (
        transformers.LagunaConfig,
        {
            "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING],
            "sliding_window": WINDOW,
            "num_attention_heads_per_layer": [6, 8, 8, 8, 6, 8],
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "pad_token_id": 0,
        },
        [0, 1, 1, 3, 0, 3],
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
                FULL: {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
            },
        },
        [0, 0, 2, 0, 4, 2],
    ),
}
MAPS = {
    "none": [0, 1, 2, 3, 4, 5],
    "CLA-2": [0, 0, 2, 2, 4, 4],
    "CLA-3": [0, 0, 0, 3, 3, 3],
    "learned": [0, 1, 0, 1, 4, 1],
    "one for all": [0, 0, 0, 0, 0, 0],
    "YOCO": [0, 1, 2, 3, 3, 3],
}
PROJECTIONS = [(), ("k",), ("v",), ("k", "v")]
MAPPED = [("qwen3", "learned"), ("qwen3 with windows", "YOCO"), ("mistral", "CLA-2")] + [("llama", name) for name in MAPS if name != "none"]
CASES = [(family, "none", ()) for family in FAMILIES] + [(*case, projections) for case in MAPPED for projections in PROJECTIONS]


def oracle_of(family: str) -> torch.nn.Module:
    kind, extra = {**FAMILIES, **OTHERS}[family][:2]
    return randomise(transformers.AutoModelForCausalLM.from_config(kind(**{**SHAPE, **extra}), attn_implementation="eager"))


def save(directory: Path, oracle: torch.nn.Module, owners: list[int], projections: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A model of transformers with an owner map, and with random projections of its readers, which are returned by their names."""
    oracle.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"kv_sharing": owners} | ({"kv_sharing_projections": list(projections)} if projections else {})
    (directory / "config.json").write_text(json.dumps(config))
    generator, heads, width = torch.Generator().manual_seed(7), SHAPE["num_key_value_heads"], SHAPE["head_dim"]
    added = {}
    for index, owner in enumerate(owners):
        for name in projections if owner != index else ():
            noise = torch.randn(heads, width, width, generator=generator) * width**-0.5
            added[f"model.layers.{index}.self_attn.shared_{name}_proj.weight"] = torch.eye(width) + noise
    save_file(load_file(directory / "model.safetensors") | added, directory / "model.safetensors")
    return added


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5 * weight


def rotate(x: Tensor, theta: float) -> Tensor:  # [tokens, heads, width]
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    pair = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pair.real, pair.imag], dim=-1)


def reference(directory: Path, ids: Tensor) -> Tensor:  # [sequences, tokens] -> [sequences, tokens, vocab]
    """The same model from its files alone, in float64, whole sequences, keys repeated for every query head, nothing shared but the map."""
    config = json.loads((directory / "config.json").read_text())
    weights = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
    width, group, eps = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"], config["rms_norm_eps"]
    theta = config["rope_parameters"]["rope_theta"]
    types = config.get("layer_types") or [SLIDING if config.get("sliding_window") else FULL] * config["num_hidden_layers"]
    rows = []
    for tokens in ids:
        x, cached = weights["model.embed_tokens.weight"][tokens], {}
        behind = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))  # how far a key lies behind a query
        for index, owner in enumerate(config["kv_sharing"]):
            w = {name.removeprefix(f"model.layers.{index}."): tensor for name, tensor in weights.items() if f".layers.{index}." in name}
            a = rms(x, w["input_layernorm.weight"], eps)
            q, k, v = (F.linear(a, w[f"self_attn.{name}_proj.weight"]).unflatten(-1, (-1, width)) for name in "qkv")
            if "self_attn.q_norm.weight" in w:
                q, k = (rms(rows_, w[f"self_attn.{name}_norm.weight"], eps) for name, rows_ in (("q", q), ("k", k)))
            q = rotate(q, theta)
            if owner == index:
                cached[index] = rotate(k, theta), v
            k, v = (part.repeat_interleave(group, dim=1) for part in cached[owner])
            if "self_attn.shared_k_proj.weight" in w:  # here on the query head, one by one
                q = torch.stack([F.linear(q[:, h], w["self_attn.shared_k_proj.weight"][h // group]) for h in range(q.shape[1])], 1)
            if "self_attn.shared_v_proj.weight" in w:  # here on every cached value, as the idea has it
                v = torch.stack([F.linear(v[:, h], w["self_attn.shared_v_proj.weight"][h // group]) for h in range(q.shape[1])], 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * width**-0.5
            hidden = (behind < 0) | ((behind >= config["sliding_window"]) if types[index] == SLIDING else (behind < 0))
            mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).flatten(1)
            x = x + F.linear(mixed, w["self_attn.o_proj.weight"])
            b = rms(x, w["post_attention_layernorm.weight"], eps)
            gated = F.silu(F.linear(b, w["mlp.gate_proj.weight"])) * F.linear(b, w["mlp.up_proj.weight"])
            x = x + F.linear(gated, w["mlp.down_proj.weight"])
        rows.append(F.linear(rms(x, weights["model.norm.weight"], eps), weights["lm_head.weight"]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_equals_transformers_without_a_map(family: str, tmp_path: Path) -> None:
    oracle = oracle_of(family)
    save(tmp_path, oracle, MAPS["none"])
    ids = random_ids(SHAPE["vocab_size"])
    torch.testing.assert_close(reference(tmp_path, ids), oracle_logits(oracle.double(), ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "owners", "projections"), CASES)
def test_mapped_models_equal_the_reference(family: str, owners: str, projections: tuple[str, ...], tmp_path: Path) -> None:
    save(tmp_path, oracle_of(family), MAPS[owners], projections)
    ids = random_ids(SHAPE["vocab_size"])
    model = load(tmp_path)
    assert list(model.layout.owner) == MAPS[owners]
    assert_equals_oracle(model, reference(tmp_path, ids), ids)


class MappedCache(transformers.DynamicCache):
    """transformers' own cache, but a reader gets its owner's rows: an oracle for one pass over whole prompts in any family.

    Projections act on the rows here, on keys transposed: (A q) . k = q . (A^T k).
    """

    def __init__(self, owners: list[int], projections: dict[str, Tensor], config: Any):
        super().__init__(config=config)
        self.owners, self.projections, self.rows = owners, projections, {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.owners[layer] == layer:
            self.rows[layer] = super().update(keys, values, layer, *args, **kwargs)
        keys, values = self.rows[self.owners[layer]]  # [1, kv_heads, rows, width]
        for_keys, for_values = (self.projections.get(f"model.layers.{layer}.self_attn.shared_{name}_proj.weight") for name in "kv")
        return keys if for_keys is None else keys @ for_keys, values if for_values is None else values @ for_values.transpose(1, 2)


@pytest.mark.parametrize(("family", "projections"), [("laguna", ()), *(("gemma3", projections) for projections in PROJECTIONS)])
def test_other_families_equal_transformers_reading_the_owners_rows(family: str, projections: tuple[str, ...], tmp_path: Path) -> None:
    oracle, owners = oracle_of(family), OTHERS[family][2]
    added = save(tmp_path, oracle, owners, projections)
    ids = random_ids(SHAPE["vocab_size"])
    with torch.no_grad():
        expected = oracle(input_ids=ids, past_key_values=MappedCache(owners, added, oracle.config)).logits
    assert (expected - oracle_logits(oracle, ids)).abs().max() > 0.1, "the map must matter"
    assert_equals_oracle(load(tmp_path), expected, ids)


def test_only_owners_store_rows(tmp_path: Path) -> None:
    """CLA-2 halves the cache, CLA-3 leaves a third; the keys and values that a reader's file still holds are not loaded."""
    config = {**SHAPE, "model_type": "llama"}
    everything = layout_from_config(config).bytes(100)
    assert layout_from_config({**config, "kv_sharing": MAPS["CLA-2"]}).bytes(100) * 2 == everything
    assert layout_from_config({**config, "kv_sharing": MAPS["CLA-3"]}).bytes(100) * 3 == everything
    save(tmp_path, oracle_of("llama"), MAPS["CLA-2"])
    model = load(tmp_path)
    assert [len(block.attention.qkv.weight) for block in model.blocks] == [160, 96] * 3


def test_the_tail_behind_the_last_owner_runs_on_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    save(tmp_path, oracle_of("llama"), MAPS["CLA-3"])
    model, seen = load(tmp_path), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    Paged(model, 1).step([random_ids(SHAPE["vocab_size"], 1)[0]], keep=[40])
    assert seen == [41, 41, 41, 1, 1, 1]


@pytest.mark.parametrize(
    ("owners", "reason"),
    [
        ([0, 2, 2, 3, 4, 5], "layer 1 reads layer 2, which runs after it"),
        ([0, 0, 1, 3, 4, 5], "layer 2 reads layer 1, which stores nothing but reads layer 0"),
        ([0, 0, 0, 3, 4, 6], "layer 5 reads layer 6, but there are layers 0 to 5"),
        ([0, 0, -1, 3, 4, 5], "layer 2 reads layer -1"),
        ([0, 0, 0], "3 entries for 6 layers"),
    ],
)
def test_maps_that_cannot_run_are_refused_with_the_reason(owners: list[int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        build_model({**SHAPE, "model_type": "llama", "kv_sharing": owners}, torch.float32)
    assert error.value.field == "kv_sharing"


def test_readers_of_another_window_or_width_are_refused() -> None:
    windows = {"layer_types": YOCO_TYPES, "use_sliding_window": True, "sliding_window": WINDOW}
    with pytest.raises(ConfigError, match=r"layer 3 \(2 heads of 16, all rows\) cannot read layer 0 \(2 heads of 16, a window of 9\)"):
        build_model({**SHAPE, **windows, "model_type": "qwen3", "kv_sharing": [0, 0, 0, 0, 4, 4]}, torch.float32)
    heads = {"num_key_value_heads": [2, 2, 3, 3, 2, 2], "model_type": "openelm", "kv_sharing": [0, 1, 2, 1, 4, 4]}
    with pytest.raises(ConfigError, match=r"layer 3 \(3 heads of 16, all rows\) cannot read layer 1 \(2 heads of 16, all rows\)"):
        layout_from_config({**SHAPE, **heads})


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"kv_sharing_projections": ["k"]}, "kv_sharing_projections"),  # without a map
        ({"kv_sharing": MAPS["CLA-2"], "kv_sharing_projections": ["q"]}, "kv_sharing_projections"),
        ({"kv_sharing": MAPS["CLA-2"], "kv_sharing_projections": "k"}, "kv_sharing_projections"),
    ],
)
def test_projections_that_mean_nothing_are_refused(extra: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_model({**SHAPE, "model_type": "llama", **extra}, torch.float32)
    assert error.value.field == field


@pytest.mark.parametrize("name", ["ZAYA1-8B", "DeepSeek-V3.2", "DeepSeek-V4-Flash"])
def test_families_whose_rows_no_other_layer_can_read_refuse_a_map(name: str) -> None:
    config = resolve(name).config
    own = list(layout_from_config(config).owner)
    with pytest.raises(ConfigError, match="takes no owner map"):
        layout_from_config({**config, "kv_sharing": [0, 0, *own[2:]]})


@pytest.mark.parametrize("kv_form", KV_FORMS)
def test_a_sliding_layer_cannot_read_rows_whose_keys_equal_their_values(kv_form: str) -> None:
    """Whatever form these rows have: fewer streams than the reader expects are a reason too."""
    config = resolve("gemma-4-26B-A4B").config
    own = list(layout_from_config(config).owner)
    with pytest.raises(ConfigError, match=r"layer 6 .* cannot read layer 5 .*: their rows differ"):
        layout_from_config({**config, "kv_sharing": [*own[:6], 5, *own[7:]]}, kv_form)


def test_families_without_projections_refuse_them() -> None:
    kind, extra, owners = OTHERS["laguna"]
    config = {**SHAPE, **extra, "model_type": kind.model_type, "kv_sharing": owners, "kv_sharing_projections": ["v"]}
    with pytest.raises(ConfigError, match="without projections of its readers"):
        build_model(config, torch.float32)


def test_a_missing_projection_is_refused_by_its_name(tmp_path: Path) -> None:
    save(tmp_path, oracle_of("llama"), MAPS["CLA-2"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kv_sharing_projections": ["k"]}))
    with pytest.raises(CheckpointError, match=r"3 tensors .* missing: model\.layers\.1\.self_attn\.shared_k_proj\.weight"):
        load(tmp_path)

"""Laguna (poolside 2026): an attention budget. Full layers have fewer query heads than windowed ones; a softplus gate scales each head.

Pre-norm blocks as in Llama. Head counts differ by layer, key-value heads do not. Full layers rotate half of each head with YaRN's
frequencies, windowed layers all of it with plain ones. Feed-forward: experts behind a sigmoid router, with one expert for every token;
the first layer is dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvshare.cache.step import Step
from kvshare.checkpoints.source import Source
from kvshare.errors import ConfigError
from kvshare.kernels import routing, small_ops
from kvshare.layers.activations import swiglu
from kvshare.layers.experts import Experts, expert_sources
from kvshare.layers.gated_mlp import GatedMlp
from kvshare.layers.key_balance import key_balance
from kvshare.layers.linear import Linear, RouterLinear
from kvshare.layers.norm import RMSNorm, add, add_then_norm
from kvshare.layers.rotary import Rotation, frequencies
from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.models.decoder import Decoder

_DEFAULT_ROPE: Mapping[str, Mapping[str, Any]] = {
    "full_attention": {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
Rotations = Mapping[str, Rotation]
"""By layer type."""
_GATES = {"per-head": True, "per-element": False}


@dataclass(frozen=True, slots=True)
class LagunaConfig:
    hidden_size: int
    vocab_size: int
    num_heads: tuple[int, ...]  # query heads of each layer
    head_dim: int
    layer_types: tuple[str, ...]  # "full_attention" or "sliding_attention"
    rope: Mapping[str, Mapping[str, Any]]  # by layer type
    gate_per_head: bool  # one gate a head, or one for each of its numbers
    bias: bool  # of the query, key, value and output projections
    sparse: tuple[bool, ...]  # which layers have experts
    dense_width: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    routed_scale: float
    router_softcap: float | None
    eps: float
    tied: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> LagunaConfig:
        fields = Fields(config)
        count, heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads", 48)
        types = fields.list_of("layer_types", count, str) or ["full_attention"] * count
        kinds = fields.list_of("mlp_layer_types", count, str) or ["dense"] + ["sparse"] * (count - 1)
        if fields.get("moe_apply_router_weight_on_input"):
            raise ConfigError("moe_apply_router_weight_on_input", "true: only weights on the experts' outputs are known")
        fields.choice("hidden_act", fields.get("hidden_act", "silu"), {"silu": None})
        rope = fields.mapping("rope_parameters") or _DEFAULT_ROPE
        for layer_type in types:
            if layer_type not in rope:
                raise ConfigError("rope_parameters", f"has no entry for {layer_type}")
        experts, chosen = fields.integer("num_experts", 256), fields.integer("num_experts_per_tok", 8)
        if chosen > experts:
            raise ConfigError("num_experts_per_tok", f"{chosen} of {experts} experts (num_experts)")
        return LagunaConfig(
            fields.integer("hidden_size", 2048),
            fields.integer("vocab_size", 100_352),
            tuple(fields.per_layer("num_attention_heads_per_layer", count))
            if fields.has("num_attention_heads_per_layer")
            else (heads,) * count,
            fields.integer("head_dim", 128),
            tuple(types),
            rope,
            _gate_per_head(fields),
            bool(fields.get("attention_bias", False)),
            tuple(fields.choice("mlp_layer_types", kind, {"dense": False, "sparse": True}) for kind in kinds),
            fields.integer("intermediate_size", 8192),
            experts,
            chosen,
            fields.integer("moe_intermediate_size", 512),
            fields.integer("shared_expert_intermediate_size", 512),
            float(fields.get("moe_routed_scaling_factor", 1.0)),
            float(fields.get("moe_router_logit_softcapping", 0.0)) or None,
            float(fields.get("rms_norm_eps", 1e-6)),
            bool(fields.get("tie_word_embeddings", False)),
        )


def _gate_per_head(fields: Fields) -> bool:
    """Released configs say it in words. `true` is one gate a head, as in transformers (in poolside's own code it was one an element)."""
    gating = fields.get("gating", True)
    return True if gating is True else fields.choice("gating", gating, _GATES)


class Attention(nn.Module):
    """Grouped-query attention whose output is scaled by softplus(W x), x being the attention's own input."""

    def __init__(self, config: LagunaConfig, layout: CacheLayout, index: int):
        super().__init__()
        self.index, self.num_heads, self.head_dim = index, config.num_heads[index], config.head_dim
        self.num_kv_heads = layout.streams_of(index)[0].heads
        kv_heads = self.num_kv_heads if layout.owner[index] == index else 0
        self.q_size = self.num_heads * self.head_dim
        self.gate_per_head = config.gate_per_head
        self.qkv = Linear(config.hidden_size, self.q_size + 2 * kv_heads * self.head_dim, config.bias)
        self.gate = Linear(config.hidden_size, self.num_heads if config.gate_per_head else self.q_size)
        self.output = Linear(self.q_size, config.hidden_size, config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.eps)
        self.k_norm = RMSNorm(self.head_dim, config.eps) if kv_heads else None

    def append(self, x: Tensor, rotation: Rotation, step: Step) -> None:  # [tokens, hidden]
        """Normalised, rotated keys and plain values of every token go into the cache."""
        rows = self.qkv.part(x, self.q_size, self.qkv.out_features).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        k, v = rows.unbind(1)  # [tokens, kv_heads, head_dim]
        assert self.k_norm is not None
        step.append(self.index, {"k": rotation.half_split(k, self.k_norm), "v": v})

    def forward(self, x: Tensor, rotation: Rotation, step: Step) -> Tensor:  # [tokens, hidden]
        q = self.qkv.part(x, 0, self.q_size).unflatten(-1, (self.num_heads, self.head_dim))
        out = step.attend(self.index, rotation.half_split(q, self.q_norm), scale=self.head_dim**-0.5)  # [tokens, heads, head_dim]
        gate = self.gate(x)  # [tokens, heads] or [tokens, heads * head_dim]
        if small_ops.takes(out) and gate.dtype == out.dtype:
            return self.output(small_ops.softplus_gate(out, gate).flatten(1))
        gate = F.softplus(gate.float()).to(out.dtype)
        gate = gate[..., None] if self.gate_per_head else gate.view_as(out)
        return self.output((out * gate).flatten(1))


class Router(nn.Module):
    """Sigmoid scores choose and weigh the experts. The correction bias, which balances their load, takes part in the choice only."""

    def __init__(self, config: LagunaConfig):
        super().__init__()
        self.experts_per_token, self.softcap = config.experts_per_token, config.router_softcap
        self.scores = RouterLinear(config.hidden_size, config.num_experts)
        self.correction = nn.Parameter(torch.empty(config.num_experts))  # [experts]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [tokens, hidden] -> chosen experts and their weights [tokens, experts a token]
        logits = self.scores(x)  # [tokens, experts]
        if routing.takes(logits):
            k, cap = self.experts_per_token, self.softcap or 0.0
            return routing.route(logits, k, "sigmoid", x.dtype, softcap=cap, bias=self.correction)
        logits = logits.float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        scores = torch.sigmoid(logits)
        chosen = (scores + self.correction).topk(self.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return chosen, (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


class SparseMlp(nn.Module):
    def __init__(self, config: LagunaConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_width, swiglu)
        self.shared = GatedMlp(config.hidden_size, config.shared_width, swiglu)
        self.routed_scale = config.routed_scale

    def forward(self, x: Tensor) -> Tensor:  # [tokens, hidden]
        return self.experts(x, *self.router(x), scale=self.routed_scale, beside=self.shared(x))


class Block(nn.Module):
    def __init__(self, config: LagunaConfig, layout: CacheLayout, index: int):
        super().__init__()
        self.index, self.owns, self.layer_type = index, layout.owner[index] == index, config.layer_types[index]
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layout, index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = SparseMlp(config) if config.sparse[index] else GatedMlp(config.hidden_size, config.dense_width, swiglu)

    def forward(self, x: Tensor, rotations: Rotations, step: Step) -> tuple[Tensor, Rotations, Step]:  # [tokens, hidden]
        normed = self.attention_norm(x)
        if self.owns:
            self.attention.append(normed, rotations[self.layer_type], step)
        if step.narrows(self.index):
            kept, step = step.rows_kept, step.tail()
            x, normed = x[kept], normed[kept]
            rotations = {layer_type: rotation.at_rows(kept) for layer_type, rotation in rotations.items()}
        x, normed = add_then_norm(x, self.attention(normed, rotations[self.layer_type], step), self.mlp_norm)
        return add(x, self.mlp(normed)), rotations, step


class Laguna(Decoder):
    released_as = ("experts one by one, as published",)
    unsupported = ("published FP8 and NVFP4 weights", "projections of readers in owner maps")

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout):
        read = LagunaConfig.read(config)
        super().__init__(layout, read.vocab_size, read.hidden_size, read.eps, read.tied)
        self.config = read
        self.blocks = nn.ModuleList(Block(self.config, layout, index) for index in range(len(layout.layers)))
        self.frequencies = {
            layer_type: frequencies(self.config.rope[layer_type], self.config.head_dim) for layer_type in set(self.config.layer_types)
        }
        self.keep_float32 = frozenset(name for name, _ in self.named_parameters() if name.endswith("router.correction"))

    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] -> [rows kept, hidden]
        x = self.embedding(tokens)
        rotations = {layer_type: waves.at(step.positions, x.dtype) for layer_type, waves in self.frequencies.items()}
        for block in self.blocks:
            x, rotations, step = block(x, rotations, step)
            if not x.shape[0]:
                break
        return self.norm(x)

    def key_balance(self) -> Mapping[int, Tensor]:
        return key_balance(self.layout, self.blocks, lambda layer: len(self.frequencies[self.config.layer_types[layer]].inverse))

    def weight_sources(self) -> dict[str, Source]:
        sources = self.base_sources()
        for name, _ in self.blocks.named_parameters():
            index, part = name.split(".", 1)
            module, kind = part.rsplit(".", 1)
            layer = f"model.layers.{index}"
            if module == "mlp.experts":
                sources[f"blocks.{name}"] = expert_sources(f"{layer}.mlp.experts", self.config.num_experts)[kind]
            elif module == "attention.qkv" and not self.blocks[int(index)].owns:
                sources[f"blocks.{name}"] = Source((f"{layer}.self_attn.q_proj.{kind}",))
            else:
                names = _BLOCK_NAMES.get(part) or tuple(f"{each}.{kind}" for each in _BLOCK_NAMES[module])
                sources[f"blocks.{name}"] = _released_or_saved(tuple(f"{layer}.{each}" for each in names))
        return sources


def _released_or_saved(names: tuple[str, ...]) -> Source:
    """Tensors under their released names, or under those of transformers' modules where a model was saved with these."""
    saved = names
    for old, new in _SAVED_NAMES.items():
        saved = tuple(name.replace(old, new) for name in saved)
    return Source(names, otherwise=None if saved == names else Source(saved))


_SAVED_NAMES = {".mlp.shared_expert.": ".mlp.shared_experts.", ".mlp.experts.e_score_": ".mlp.gate.e_score_"}

_BLOCK_NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.gate": ("self_attn.g_proj",),
    "attention.output": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "mlp.router.scores": ("mlp.gate",),
    "mlp.router.correction": ("mlp.experts.e_score_correction_bias",),
    "mlp.shared.gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.shared.down": ("mlp.shared_expert.down_proj",),
}

"""Gemma 4 (Google DeepMind 2026): E2B, E4B, 12B, 26B-A4B and 31B, text only.

Sliding and full layers alternate, with heads of their own width and rotations of their own. In the E models the last layers
read the last owner of their kind, and every layer is fed a per-layer embedding. In the others the full layers have no value projection:
keys and values are two norms of one projection (`layers/key_from_value.py`). The 26B adds routed experts beside each dense layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.cache.step import KeyRebuild, Step
from kvshare.checkpoints.source import Source
from kvshare.errors import ConfigError
from kvshare.kernels import routing
from kvshare.layers.activations import geglu
from kvshare.layers.experts import Experts
from kvshare.layers.gated_mlp import GatedMlp
from kvshare.layers.key_from_value import KeyRotations
from kvshare.layers.linear import Linear, RouterLinear
from kvshare.layers.norm import RMSNorm, add_normed, add_then_norm, scaled
from kvshare.layers.per_layer_embedding import PerLayerEmbedding
from kvshare.layout import CacheLayout, Stream
from kvshare.layout.config import Fields
from kvshare.models.gemma_attention import Attention, AttentionShape
from kvshare.models.gemma_base import Context, GemmaModel, block_sources, per_layer_sources


@dataclass(frozen=True, slots=True)
class Gemma4Config:
    hidden_size: int
    intermediate_size: int
    num_heads: int  # query heads, in every layer
    eps: float
    bias: bool  # of the attention's projections
    key_is_value: bool  # full layers have no value projection
    wide_readers: bool  # layers that read another's cache have twice the feed-forward width
    per_layer_width: int  # of the per-layer embeddings; 0: there are none
    per_layer_entries: int
    num_experts: int  # 0: dense
    experts_per_token: int
    expert_width: int

    @staticmethod
    def read(config: Mapping[str, Any]) -> Gemma4Config:
        fields = Fields(config)
        if fields.get("use_bidirectional_attention") == "all":
            raise ConfigError("use_bidirectional_attention", "'all' makes an encoder: it is planned, but only causal attention runs")
        sparse = bool(fields.get("enable_moe_block", False))
        per_layer_width = fields.integer("hidden_size_per_layer_input", 256, least=0)
        return Gemma4Config(
            fields.integer("hidden_size"),
            fields.integer("intermediate_size"),
            fields.integer("num_attention_heads"),
            float(fields.get("rms_norm_eps", 1e-6)),
            bias=bool(fields.get("attention_bias", False)),
            key_is_value=bool(fields.get("attention_k_eq_v", False)),
            wide_readers=bool(fields.get("use_double_wide_mlp", False)),
            per_layer_width=per_layer_width,
            per_layer_entries=fields.integer("vocab_size_per_layer_input", fields.integer("vocab_size")) if per_layer_width else 0,
            num_experts=fields.integer("num_experts") if sparse else 0,
            experts_per_token=fields.integer("top_k_experts") if sparse else 0,
            expert_width=fields.integer("moe_intermediate_size") if sparse else 0,
        )


class Router(nn.Module):
    """Scores the un-normed residual; the softmax runs over all experts, then the chosen ones are scaled to sum to 1."""

    def __init__(self, config: Gemma4Config):
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.norm = RMSNorm(config.hidden_size, config.eps, weighted=False)
        self.scale = nn.Parameter(torch.empty(config.hidden_size))  # [hidden]
        self.scores = RouterLinear(config.hidden_size, config.num_experts)
        self.expert_scale = nn.Parameter(torch.empty(config.num_experts))  # [experts]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [tokens, hidden] -> chosen, weights [tokens, k]
        scores = self.scores(scaled(self.norm(x), self.scale, x.shape[-1] ** -0.5))
        if routing.takes(scores):
            return routing.route(scores, self.experts_per_token, "softmax", torch.float32, expert_scale=self.expert_scale)
        weights, chosen = scores.softmax(dim=-1, dtype=torch.float32).topk(self.experts_per_token, dim=-1)
        return chosen, weights / weights.sum(dim=-1, keepdim=True) * self.expert_scale[chosen]


class FeedForward(nn.Module):
    """The dense layer, and in the 26B the experts beside it: both read the same residual, each through norms of its own."""

    def __init__(self, config: Gemma4Config, width: int):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = GatedMlp(config.hidden_size, width, geglu)
        self.router = Router(config) if config.num_experts else None
        if config.num_experts:
            self.mlp_out_norm = RMSNorm(config.hidden_size, config.eps)
            self.experts_norm = RMSNorm(config.hidden_size, config.eps)
            self.experts = Experts(config.num_experts, config.hidden_size, config.expert_width, geglu)
            self.experts_out_norm = RMSNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:  # [tokens, hidden] each, the second what `norm` makes of the first
        dense = self.mlp(normed)
        if self.router is None:
            return dense
        chosen, weights = self.router(x)
        routed = self.experts(self.experts_norm(x), chosen, weights)
        return add_normed(self.mlp_out_norm(dense), routed, self.experts_out_norm)


class PerLayerGate(nn.Module):
    """Lets the layer's own embedding of the token into the residual, gated by the residual; `out_norm` is for what is added."""

    def __init__(self, config: Gemma4Config):
        super().__init__()
        self.gate = Linear(config.hidden_size, config.per_layer_width)
        self.projection = Linear(config.per_layer_width, config.hidden_size)
        self.out_norm = RMSNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor, own: Tensor) -> Tensor:  # [tokens, hidden], [tokens, per_layer_width]
        return self.projection(geglu(self.gate(x), own))


class Block(nn.Module):
    def __init__(self, config: Gemma4Config, index: int, kind: str, streams: Sequence[Stream], owns: bool, key_rotations: KeyRotations):
        """`streams` are what the layer attends to: its own, or those of the layer that it reads."""
        super().__init__()
        self.index, self.kind = index, kind
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        shape = AttentionShape(config.hidden_size, config.num_heads, config.eps, config.bias)
        key_is_value = config.key_is_value and kind == "full"
        self.attention = Attention(shape, index, streams, owns, key_rotations if key_is_value else None)
        self.attention_out_norm = RMSNorm(config.hidden_size, config.eps)
        wide = 2 if config.wide_readers and not owns else 1
        self.feed_forward = FeedForward(config, wide * config.intermediate_size)
        self.feed_forward_out_norm = RMSNorm(config.hidden_size, config.eps)
        self.per_layer = PerLayerGate(config) if config.per_layer_width else None
        self.layer_scalar = nn.Buffer(torch.empty(1))

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:  # [tokens, hidden]
        normed, q = self.attention_norm(x), None
        if self.attention.owns:
            q = self.attention.append(normed, context.rotations[self.kind], context.step)
        if context.step.narrows(self.index):
            kept, context = context.step.rows_kept, context.narrowed(self.index)
            x, normed = x[kept], normed[kept]
            if not x.shape[0]:
                return x, context
        attended = self.attention(normed, q, context.rotations[self.kind], context.step)
        x, normed = add_then_norm(x, attended, self.feed_forward.norm, self.attention_out_norm)
        fed = self.feed_forward(x, normed)
        if self.per_layer is None or context.inputs is None:
            return add_normed(x, fed, self.feed_forward_out_norm, self.layer_scalar), context
        x = add_normed(x, fed, self.feed_forward_out_norm)
        own = self.per_layer(x, context.inputs.of(self.index))
        return add_normed(x, own, self.per_layer.out_norm, self.layer_scalar), context


class Gemma4(GemmaModel):
    unsupported = ("image and audio towers (skipped at load, and said so)", "attention in both directions")
    memory_mapped = frozenset({"per_layer.table"})

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout):
        super().__init__(config, layout)
        self.config = Gemma4Config.read(config)
        width, count = self.config.per_layer_width, len(layout.layers)
        key_rotations = KeyRotations(self.frequencies["full"])
        blocks = [
            Block(self.config, index, layer.kind, layout.streams_of(index), layer.owner == index, key_rotations)
            for index, layer in enumerate(layout.layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        for block in blocks:
            block.attention.rebuild = self.key_rebuild(block.index)
        entries, hidden, eps = self.config.per_layer_entries, self.config.hidden_size, self.config.eps
        self.per_layer = PerLayerEmbedding(entries, count, width, hidden, eps) if width else None

    def key_rebuild(self, layer: int) -> KeyRebuild | None:
        """How the keys that `layer` reads are made from what its owner stores; None where it stores them."""
        attention = self.blocks[self.layout.owner[layer]].attention
        return attention.keys_from if isinstance(attention, Attention) and "k" not in attention.stored else None

    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] -> [rows kept, hidden]
        x = self.embed(tokens)
        inputs = None
        if self.per_layer is not None:  # the last owner needs them only for the rows that go on
            last = self.layout.tail - 1
            inputs = self.per_layer(tokens, x, 0, last if step.narrows(last) else len(self.blocks))
        context = self.context(step, x.dtype, inputs)
        for block in self.blocks:
            x, context = block(x, context)
            if not x.shape[0]:  # a chunk inside a prompt: nobody asked for its logits
                break
        return self.norm(x)

    def weight_sources(self) -> dict[str, Source]:
        sources = self.base_sources()
        if self.per_layer is not None:
            sources |= per_layer_sources()
        return sources | block_sources(self.blocks, MODULE_NAMES, TENSOR_NAMES)


TENSOR_NAMES = {
    "layer_scalar": "layer_scalar",
    "feed_forward.router.scale": "router.scale",
    "feed_forward.router.expert_scale": "router.per_expert_scale",
    "feed_forward.experts.gate_up": "experts.gate_up_proj",
    "feed_forward.experts.down": "experts.down_proj",
}

MODULE_NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention_out_norm": ("post_attention_layernorm",),
    "feed_forward.norm": ("pre_feedforward_layernorm",),
    "feed_forward.mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.mlp.down": ("mlp.down_proj",),
    "feed_forward.router.scores": ("router.proj",),
    "feed_forward.mlp_out_norm": ("post_feedforward_layernorm_1",),
    "feed_forward.experts_norm": ("pre_feedforward_layernorm_2",),
    "feed_forward.experts_out_norm": ("post_feedforward_layernorm_2",),
    "feed_forward_out_norm": ("post_feedforward_layernorm",),
    "per_layer.gate": ("per_layer_input_gate",),
    "per_layer.projection": ("per_layer_projection",),
    "per_layer.out_norm": ("post_per_layer_input_norm",),
}

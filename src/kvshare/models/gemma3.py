"""Gemma 3 (Google DeepMind 2025), text only: 270M to 27B. Five sliding layers to a full one, each kind with a rotation of its own; norms
before and after attention and feed-forward, their weights stored minus 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvshare.cache.step import Step
from kvshare.checkpoints.source import Source
from kvshare.errors import ConfigError
from kvshare.layers.activations import geglu
from kvshare.layers.gated_mlp import GatedMlp
from kvshare.layers.norm import RMSNorm, add_normed, add_then_norm
from kvshare.layers.reader import with_value_projection
from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.layout.rules.sharing import reader_projections
from kvshare.models.gemma_attention import Attention, AttentionShape
from kvshare.models.gemma_base import Context, GemmaModel, block_sources


@dataclass(frozen=True, slots=True)
class Gemma3Config:
    hidden_size: int
    intermediate_size: int
    eps: float
    attention: AttentionShape

    @staticmethod
    def read(config: Mapping[str, Any]) -> Gemma3Config:
        fields = Fields(config)
        if fields.get("use_bidirectional_attention"):
            raise ConfigError("use_bidirectional_attention", "true makes an encoder: it is planned, but only causal attention runs")
        if fields.has("attn_logit_softcapping"):
            raise ConfigError("attn_logit_softcapping", f"{fields.get('attn_logit_softcapping')}: Gemma 3 has no soft cap on its scores")
        hidden, eps = fields.integer("hidden_size"), float(fields.get("rms_norm_eps", 1e-6))
        attention = AttentionShape(
            hidden,
            fields.integer("num_attention_heads", 8),
            eps,
            bias=bool(fields.get("attention_bias", False)),
            scale=float(fields.get("query_pre_attn_scalar", 256)) ** -0.5,  # not the head's width: 27B has 168 and heads of 128
            norm_offset=1.0,
            norms_values=False,
            reader_projections=reader_projections(fields),
        )
        return Gemma3Config(hidden, fields.integer("intermediate_size"), eps, attention)

    def norm(self) -> RMSNorm:
        return RMSNorm(self.hidden_size, self.eps, offset=1.0)


class Block(nn.Module):
    def __init__(self, config: Gemma3Config, layout: CacheLayout, index: int):
        super().__init__()
        self.index, self.kind = index, layout.layers[index].kind
        self.attention_norm = config.norm()
        self.attention = Attention(config.attention, index, layout.streams_of(index), layout.owner[index] == index)
        self.attention_out_norm = config.norm()
        self.mlp_norm = config.norm()
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, geglu)
        self.mlp_out_norm = config.norm()

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:  # [tokens, hidden]
        normed, q = self.attention_norm(x), None
        if self.attention.owns:
            q = self.attention.append(normed, context.rotations[self.kind], context.step)
        if context.step.narrows(self.index):
            kept, context = context.step.rows_kept, context.narrowed(self.index)
            x, normed = x[kept], normed[kept]
        attended = self.attention(normed, q, context.rotations[self.kind], context.step)
        x, normed = add_then_norm(x, attended, self.mlp_norm, self.attention_out_norm)
        return add_normed(x, self.mlp(normed), self.mlp_out_norm), context


class Gemma3(GemmaModel):
    unsupported = ("image towers (skipped at load, and said so)",)
    takes_reader_projections = True

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout):
        super().__init__(config, layout, norm_offset=1.0)
        self.config = Gemma3Config.read(config)
        self.blocks = nn.ModuleList(Block(self.config, layout, index) for index in range(len(layout.layers)))

    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] -> [rows kept, hidden]
        x = self.embed(tokens)
        context = self.context(step, x.dtype)
        for block in self.blocks:
            x, context = block(x, context)
            if not x.shape[0]:  # a chunk inside a prompt: nobody asked for its logits
                break
        return self.norm(x)

    def weight_sources(self) -> dict[str, Source]:
        sources = self.base_sources() | block_sources(self.blocks, _MODULE_NAMES, {})
        if "v" in self.config.attention.reader_projections:
            for index, owner in enumerate(self.layout.owner):
                if owner != index:
                    name = f"blocks.{index}.attention.output.weight"
                    sources[name] = with_value_projection(sources[name], index)
        return sources


_MODULE_NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention_out_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "mlp_out_norm": ("post_feedforward_layernorm",),
}

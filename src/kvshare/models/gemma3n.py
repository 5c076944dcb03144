"""Gemma 3n (Google DeepMind 2025), text only: E2B and E4B.

Four residual streams of which a block works on one (AltUp, Baykal et al. 2023), a low-rank residual beside attention (LAuReL, Menghani
et al. 2024), feed-forward layers of which the first keep only the largest gates, per-layer embeddings, and last layers that read the
last owner of their kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.cache.step import Step
from kvshare.checkpoints.source import Source
from kvshare.errors import ConfigError
from kvshare.layers.activations import GatedActivation, geglu
from kvshare.layers.altup import AltUp, add_behind_first, mean_of, streams_of
from kvshare.layers.gated_mlp import GatedMlp
from kvshare.layers.linear import Linear
from kvshare.layers.norm import RMSNorm, add_normed, add_then_norm
from kvshare.layers.per_layer_embedding import PerLayerEmbedding
from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.models.gemma_attention import Attention, AttentionShape
from kvshare.models.gemma_base import Context, GemmaModel, block_sources, per_layer_sources


@dataclass(frozen=True, slots=True)
class Gemma3nConfig:
    hidden_size: int
    intermediate_sizes: tuple[int, ...]  # by layer
    sparsities: tuple[float, ...]  # by layer: the share of gates that are cut; 0 keeps all
    eps: float
    streams: int  # of the residual; the first is the one that blocks work on
    scales_output: bool  # whether the per-layer gate sees the first stream times a weight
    laurel_rank: int
    per_layer_width: int
    per_layer_entries: int
    attention: AttentionShape

    @staticmethod
    def read(config: Mapping[str, Any], count: int) -> Gemma3nConfig:
        fields = Fields(config)
        if fields.integer("altup_active_idx", 0, least=0) != 0:
            raise ConfigError(
                "altup_active_idx", f"{fields.get('altup_active_idx')}: blocks that work on another stream than the first do not run"
            )
        hidden, eps = fields.integer("hidden_size"), float(fields.get("rms_norm_eps", 1e-6))
        heads, bias = fields.integer("num_attention_heads", 8), bool(fields.get("attention_bias", False))
        sparsities = fields.list_of("activation_sparsity_pattern", count, (int, float))
        return Gemma3nConfig(
            hidden,
            tuple(fields.per_layer("intermediate_size", count)),
            tuple(map(float, sparsities)) if sparsities else (0.0,) * count,
            eps,
            fields.integer("altup_num_inputs", 4),
            bool(fields.get("altup_correct_scale", True)),
            fields.integer("laurel_rank", 64),
            fields.integer("hidden_size_per_layer_input", 256),
            fields.integer("vocab_size_per_layer_input", 262_144),
            AttentionShape(hidden, heads, eps, bias),
        )

    def norm(self) -> RMSNorm:
        return RMSNorm(self.hidden_size, self.eps)


class Laurel(nn.Module):
    """A learned residual of low rank."""

    def __init__(self, config: Gemma3nConfig):
        super().__init__()
        self.left = Linear(config.hidden_size, config.laurel_rank)
        self.right = Linear(config.laurel_rank, config.hidden_size)
        self.out_norm = config.norm()

    def forward(self, x: Tensor) -> Tensor:  # [tokens, hidden]
        return add_normed(x, self.right(self.left(x)), self.out_norm)


def activation_for(sparsity: float) -> GatedActivation:
    """Where gates are normally distributed, the cut lies at their quantile `sparsity`."""
    return GatedActivation(gelu=True, deviations=NormalDist().inv_cdf(sparsity)) if sparsity > 0 else geglu


class PerLayerGate(nn.Module):
    """What the layer's own embedding of the token adds to the streams that blocks do not work on, gated by the one that they do.

    `out_norm` is for what is added.
    """

    def __init__(self, config: Gemma3nConfig):
        super().__init__()
        self.gate = Linear(config.hidden_size, config.per_layer_width)
        self.projection = Linear(config.per_layer_width, config.hidden_size)
        self.out_norm = config.norm()

    def forward(self, x: Tensor, own: Tensor) -> Tensor:  # [tokens, hidden], [tokens, per_layer_width]
        return self.projection(geglu(self.gate(x), own))


class Block(nn.Module):
    def __init__(self, config: Gemma3nConfig, layout: CacheLayout, index: int):
        super().__init__()
        self.index, self.kind = index, layout.layers[index].kind
        self.altup = AltUp(config.hidden_size, config.streams, config.eps)
        self.attention_norm = config.norm()
        self.laurel = Laurel(config)
        self.attention = Attention(config.attention, index, layout.streams_of(index), layout.owner[index] == index)
        self.attention_out_norm = config.norm()
        self.mlp_norm = config.norm()
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_sizes[index], activation_for(config.sparsities[index]))
        self.mlp_out_norm = config.norm()
        self.per_layer = PerLayerGate(config)
        self.scales_output = config.scales_output
        self.output_scale = nn.Parameter(torch.empty(config.hidden_size))  # [hidden]

    def forward(self, streams: Tensor, context: Context) -> tuple[Tensor, Context]:  # [tokens, streams, hidden]
        streams = self.altup.predict(streams)
        x = streams[:, 0]
        normed, q = self.attention_norm(x), None
        if self.attention.owns:
            q = self.attention.append(normed, context.rotations[self.kind], context.step)
        if context.step.narrows(self.index):
            kept, context = context.step.rows_kept, context.narrowed(self.index)
            streams, normed = streams[kept], normed[kept]
            x = streams[:, 0]
        attended = add_normed(x, self.attention(normed, q, context.rotations[self.kind], context.step), self.attention_out_norm)
        x, normed = add_then_norm(attended, self.laurel(normed), self.mlp_norm, factor=2**-0.5)
        x, normed = add_then_norm(x, self.mlp(normed), self.altup.router_norm, self.mlp_out_norm)
        streams, seen = self.altup.correct(streams, x, normed, self.output_scale if self.scales_output else None)
        assert context.inputs is not None
        added = self.per_layer(seen, context.inputs.of(self.index))
        return add_behind_first(streams, added, self.per_layer.out_norm), context


class Gemma3n(GemmaModel):
    unsupported = ("image and audio towers (skipped at load, and said so)",)
    memory_mapped = frozenset({"per_layer.table"})

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout):
        super().__init__(config, layout)
        count = len(layout.layers)
        self.config = read = Gemma3nConfig.read(config, count)
        others = read.streams - 1
        self.spread = Linear(read.hidden_size, others * read.hidden_size)  # the embedding to the streams behind the first
        self.gather = nn.ModuleList(Linear(read.hidden_size, read.hidden_size) for _ in range(others))  # and back
        self.per_layer = PerLayerEmbedding(read.per_layer_entries, count, read.per_layer_width, read.hidden_size, read.eps)
        self.blocks = nn.ModuleList(Block(read, layout, index) for index in range(count))

    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] -> [rows kept, hidden]
        x = self.embed(tokens)
        last = self.layout.tail - 1  # it needs its per-layer inputs only for the rows that go on
        inputs = self.per_layer(tokens, x, 0, last if step.narrows(last) else len(self.blocks))
        context = self.context(step, x.dtype, inputs)
        streams = streams_of(x, self.spread(x).split(self.hidden_size, dim=-1))  # [tokens, streams, hidden]
        for block in self.blocks:
            streams, context = block(streams, context)
            if not len(streams):  # a chunk inside a prompt: nobody asked for its logits
                return streams[:, 0]
        gathered = [projection(streams[:, index + 1]) for index, projection in enumerate(self.gather)]
        return self.norm(mean_of(streams[:, 0], gathered))

    def weight_sources(self) -> dict[str, Source]:
        others = range(len(self.gather))
        spread = {"spread.weight": Source(tuple(f"model.altup_projections.{index}.weight" for index in others))}
        gather = {f"gather.{index}.weight": Source((f"model.altup_unembed_projections.{index}.weight",)) for index in others}
        return self.base_sources() | per_layer_sources() | spread | gather | block_sources(self.blocks, _MODULE_NAMES, _TENSOR_NAMES)


_TENSOR_NAMES = {"output_scale": "altup.correct_output_scale"}

_MODULE_NAMES = {
    "altup.router_norm": ("altup.router_norm",),
    "altup.router": ("altup.modality_router",),
    "altup.prediction": ("altup.prediction_coefs",),
    "altup.correction": ("altup.correction_coefs",),
    "attention_norm": ("input_layernorm",),
    "laurel.left": ("laurel.linear_left",),
    "laurel.right": ("laurel.linear_right",),
    "laurel.out_norm": ("laurel.post_laurel_norm",),
    "attention_out_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "mlp_out_norm": ("post_feedforward_layernorm",),
    "per_layer.gate": ("per_layer_input_gate",),
    "per_layer.projection": ("per_layer_projection",),
    "per_layer.out_norm": ("post_per_layer_input_norm",),
}

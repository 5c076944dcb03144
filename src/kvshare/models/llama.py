"""Llama and its relatives (Touvron et al. 2023): Llama 2/3, Mistral, Qwen 2/3, SmolLM2. Grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvshare.cache.step import Step
from kvshare.checkpoints.source import Source
from kvshare.layers.activations import swiglu
from kvshare.layers.gated_mlp import GatedMlp
from kvshare.layers.key_balance import key_balance
from kvshare.layers.linear import Linear
from kvshare.layers.norm import RMSNorm, add, add_then_norm
from kvshare.layers.reader import KeyProjection, with_value_projection
from kvshare.layers.rotary import Rotation, frequencies
from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.layout.rules.sharing import reader_projections
from kvshare.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int  # query heads
    head_dim: int
    eps: float
    rope: Mapping[str, Any]
    tied: bool  # the head is the embedding
    qk_norm: bool  # Qwen 3: RMSNorm on each head of q and k, before the rotation
    qkv_bias: bool  # Qwen 2
    output_bias: bool
    mlp_bias: bool
    reader_projections: frozenset[str]  # of "k" and "v": what every reader of an owner map has a matrix for

    @staticmethod
    def read(config: Mapping[str, Any]) -> LlamaConfig:
        fields = Fields(config)
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        family = fields.get("model_type")
        rope = {
            "rope_theta": fields.get("rope_theta", 10_000.0),
            **(fields.get("rope_scaling") or {}),
            **(fields.get("rope_parameters") or {}),
        }
        return LlamaConfig(
            hidden,
            fields.integer("intermediate_size"),
            fields.integer("vocab_size"),
            heads,
            fields.integer("head_dim", hidden // heads),
            float(fields.get("rms_norm_eps", 1e-6)),
            rope,
            tied=bool(fields.get("tie_word_embeddings", False)),
            qk_norm=family == "qwen3",
            qkv_bias=bool(fields.get("attention_bias", family == "qwen2")),
            output_bias=bool(fields.get("attention_bias", False)) and family != "qwen2",
            mlp_bias=bool(fields.get("mlp_bias", False)),
            reader_projections=reader_projections(fields),
        )


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layout: CacheLayout, index: int):
        super().__init__()
        self.index = index
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_kv_heads = layout.streams_of(index)[0].heads
        kv_heads = self.num_kv_heads if layout.owner[index] == index else 0  # a reader has no keys and values of its own
        self.qkv = Linear(config.hidden_size, (self.num_heads + 2 * kv_heads) * self.head_dim, config.qkv_bias)
        self.output = Linear(self.num_heads * self.head_dim, config.hidden_size, config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.eps) if config.qk_norm and kv_heads else None
        self.q_size = self.num_heads * self.head_dim
        projects = "k" in config.reader_projections and not kv_heads
        self.key_projection = KeyProjection(self.num_kv_heads, self.head_dim) if projects else None

    def append(self, x: Tensor, rotation: Rotation, step: Step) -> Tensor | None:  # [tokens, hidden]
        """Keys and values of every token go into the cache, keys rotated. Returns the queries' heads where every token goes on."""
        narrows = step.narrows(self.index)
        projected = self.qkv.part(x, self.q_size if narrows else 0, self.qkv.out_features)
        num_heads = (0 if narrows else self.num_heads, self.num_kv_heads, self.num_kv_heads)
        heads = projected.view(x.shape[0], sum(num_heads), self.head_dim)  # [tokens, heads, head_dim], as all of its parts
        q, k, v = heads.split_with_sizes(num_heads, dim=1)
        step.append(self.index, {"k": rotation.half_split(k, self.k_norm), "v": v})
        return None if narrows else q

    def forward(self, x: Tensor, q: Tensor | None, rotation: Rotation, step: Step) -> Tensor:  # [tokens, hidden]
        """`q` is what `append` returned, if it did."""
        if q is None:
            q = self.qkv.part(x, 0, self.q_size).view(x.shape[0], self.num_heads, self.head_dim)
        queries = rotation.half_split(q, self.q_norm)
        if self.key_projection is not None:
            queries = self.key_projection(queries)
        return self.output(step.attend(self.index, queries, scale=self.head_dim**-0.5).flatten(1))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layout: CacheLayout, index: int):
        super().__init__()
        self.index, self.owns = index, layout.owner[index] == index
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layout, index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, swiglu, config.mlp_bias)

    def forward(self, x: Tensor, rotation: Rotation, step: Step) -> tuple[Tensor, Rotation, Step]:  # [tokens, hidden]
        normed, q = self.attention_norm(x), None
        if self.owns:
            q = self.attention.append(normed, rotation, step)
        if step.narrows(self.index):
            kept, step = step.rows_kept, step.tail()
            x, normed, rotation = x[kept], normed[kept], rotation.at_rows(kept)
        x, normed = add_then_norm(x, self.attention(normed, q, rotation, step), self.mlp_norm)
        return add(x, self.mlp(normed)), rotation, step


class Llama(Decoder):
    unsupported = ("mixtures of experts",)
    takes_reader_projections = True

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout):
        read = LlamaConfig.read(config)
        super().__init__(layout, read.vocab_size, read.hidden_size, read.eps, read.tied)
        self.config = read
        self.blocks = nn.ModuleList(Block(self.config, layout, index) for index in range(len(layout.layers)))
        self.frequencies = frequencies(self.config.rope, self.config.head_dim)

    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] -> [rows kept, hidden]
        x = self.embedding(tokens)
        rotation = self.frequencies.at(step.positions, x.dtype)
        for block in self.blocks:
            x, rotation, step = block(x, rotation, step)
            if not x.shape[0]:  # a chunk inside a prompt: nobody asked for its logits
                break
        return self.norm(x)

    def key_balance(self) -> Mapping[int, Tensor]:
        return key_balance(self.layout, self.blocks, lambda layer: len(self.frequencies.inverse))

    def weight_sources(self) -> dict[str, Source]:
        sources = self.base_sources()
        for name, _ in self.blocks.named_parameters():
            index, part = name.split(".", 1)
            module, kind = part.rsplit(".", 1)
            reads = not self.blocks[int(index)].owns
            names = ("self_attn.q_proj",) if reads and module == "attention.qkv" else _BLOCK_NAMES[module]
            source = Source(tuple(f"model.layers.{index}.{each}.{kind}" for each in names))
            if reads and part == "attention.output.weight" and "v" in self.config.reader_projections:
                source = with_value_projection(source, int(index))
            sources[f"blocks.{name}"] = source
        return sources


_BLOCK_NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.key_projection": ("self_attn.shared_k_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}

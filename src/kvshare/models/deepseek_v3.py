"""DeepSeek V3 (2024) and V3.2 (2025): multi-head latent attention, and in V3.2 an indexer that selects the tokens each query attends to.

What is cached is one latent c of `kv_lora_rank` numbers a token, for all heads, and one rotated key r. Keys and values of a head are
linear in the latent, so the matrices that make them are absorbed into queries and outputs, and attention runs over the latents:

    q_h . k_h = q_h . (K_h c) + q'_h . r = (K_h^T q_h) . c + q'_h . r          sum of v_h = V_h (sum of c)

Feed-forward: experts behind a sigmoid router that first chooses groups of experts, with one expert for every token; the first layers
are dense. Rotation is of interleaved pairs in attention, of split halves in the indexer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.cache.step import Step
from kvshare.checkpoints.source import Source
from kvshare.errors import ConfigError
from kvshare.kernels import routing
from kvshare.layers.activations import swiglu
from kvshare.layers.experts import Experts, expert_sources
from kvshare.layers.gated_mlp import GatedMlp
from kvshare.layers.latent_expansion import LatentExpansion, joined
from kvshare.layers.linear import Linear, RouterLinear
from kvshare.layers.norm import LayerNorm, RMSNorm, add, add_then_norm
from kvshare.layers.rotary import Frequencies, Rotation, frequencies, yarn_magnitude
from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.models.decoder import Decoder

_LATENT_EPS = 1e-6  # of the norms inside attention, whatever the config says


@dataclass(frozen=True, slots=True)
class DeepseekV3Config:
    hidden_size: int
    vocab_size: int
    num_heads: int
    q_rank: int | None  # queries may be made from the hidden state at once
    kv_rank: int  # the latent
    plain_width: int  # of a head's queries and keys: what is not rotated
    rotated_width: int
    value_width: int
    index_heads: int  # 0: every query attends to every token
    index_width: int
    index_top_k: int
    dense: tuple[bool, ...]  # layers without experts
    dense_width: int
    num_experts: int
    experts_per_token: int
    num_groups: int  # of experts
    groups_per_token: int
    expert_width: int
    shared_width: int
    normalised: bool  # weights of the chosen experts sum to `routed_scale`
    routed_scale: float
    eps: float
    tied: bool
    frequencies: Frequencies
    softmax_scale: float

    @staticmethod
    def read(config: Mapping[str, Any]) -> DeepseekV3Config:
        fields = Fields(config)
        for name, known in (("attention_bias", False), ("rope_interleave", True), ("scoring_func", "sigmoid"), ("hidden_act", "silu")):
            if fields.get(name, known) != known:
                raise ConfigError(name, f"{fields.get(name)!r}: only {known!r} is known for DeepSeek V3")
        layers, indexed = fields.integer("num_hidden_layers"), fields.has("index_head_dim")
        kinds = fields.list_of("mlp_layer_types", layers, str)
        first_sparse = fields.integer("first_k_dense_replace", 3, least=0)
        width = fields.integer("moe_intermediate_size")
        plain, rotated = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
        rope = {"rope_theta": fields.get("rope_theta", 10_000.0), **fields.mapping("rope_scaling"), **fields.mapping("rope_parameters")}
        return DeepseekV3Config(
            fields.integer("hidden_size"),
            fields.integer("vocab_size"),
            fields.integer("num_attention_heads"),
            fields.integer("q_lora_rank") if indexed or fields.has("q_lora_rank") else None,
            fields.integer("kv_lora_rank"),
            plain,
            rotated,
            fields.integer("v_head_dim"),
            fields.integer("index_n_heads") if indexed else 0,
            fields.integer("index_head_dim") if indexed else 0,
            fields.integer("index_topk") if indexed else 0,
            tuple(fields.choice("mlp_layer_types", kind, {"dense": True, "sparse": False}) for kind in kinds)
            if kinds
            else tuple(layer < first_sparse for layer in range(layers)),
            fields.integer("intermediate_size"),
            fields.integer("n_routed_experts"),
            fields.integer("num_experts_per_tok"),
            fields.integer("n_group", 1),
            fields.integer("topk_group", 1),
            width,
            width * fields.integer("n_shared_experts", 1),
            bool(fields.get("norm_topk_prob", True)),
            float(fields.get("routed_scaling_factor", 1.0)),
            float(fields.get("rms_norm_eps", 1e-6)),
            bool(fields.get("tie_word_embeddings", False)),
            frequencies({**rope, "partial_rotary_factor": 1.0}, rotated),
            (plain + rotated) ** -0.5 * _sharpening(rope) ** 2,
        )


def _sharpening(rope: Mapping[str, Any]) -> float:
    """YaRN's correction where a config applies it to whole queries and keys (`mscale_all_dim`), rotated or not."""
    weight = float(rope.get("mscale_all_dim") or 0)
    return yarn_magnitude(float(rope["factor"]), weight) if weight and rope.get("rope_type", rope.get("type")) == "yarn" else 1.0


class Attention(nn.Module):
    def __init__(self, config: DeepseekV3Config, index: int):
        super().__init__()
        self.index, self.config = index, config
        heads, query_width = config.num_heads, config.plain_width + config.rotated_width
        # everything that is cached, in one product: the latent, the key to be rotated, the indexer's key
        self.cached_sizes = [config.kv_rank, config.rotated_width, config.index_width]
        self.cached = Linear(config.hidden_size, sum(self.cached_sizes))
        self.latent_norm = RMSNorm(config.kv_rank, _LATENT_EPS)
        self.query_down = Linear(config.hidden_size, config.q_rank) if config.q_rank else None
        self.query_norm = RMSNorm(config.q_rank, _LATENT_EPS) if config.q_rank else None
        self.query_up = Linear(config.q_rank or config.hidden_size, heads * query_width)
        self.expand = LatentExpansion(heads, config.plain_width, config.value_width, config.kv_rank)
        self.output = Linear(heads * config.value_width, config.hidden_size)
        self.indexer = Indexer(config, index) if config.index_heads else None

    def append(self, x: Tensor, rotation: Rotation, step: Step) -> None:  # [tokens, hidden]
        latent, key, index_key = self.cached(x).split(self.cached_sizes, dim=-1)
        rows = {"latent": joined(self.latent_norm(latent)[:, None], rotation.interleaved(key[:, None]))}
        if self.indexer is not None:
            rows["index"] = rotation.half_split(self.indexer.key_norm(index_key)[:, None])
        step.append(self.index, rows)

    def forward(self, x: Tensor, rotation: Rotation, step: Step) -> Tensor:  # [tokens, hidden]
        config = self.config
        residual = self.query_norm(self.query_down(x)) if self.query_down is not None and self.query_norm is not None else x
        q = rotation.interleaved(self.query_up(residual).unflatten(-1, (config.num_heads, -1)))  # [tokens, heads, plain + rotated]
        plain, rotated = q.split([config.plain_width, config.rotated_width], dim=-1)
        absorbed = self.expand.absorbed(plain)  # K_h^T q_h: [tokens, heads, kv_rank]
        entries = self.indexer(x, residual, rotation, step) if self.indexer is not None else None
        out = step.attend(self.index, joined(absorbed, rotated), scale=config.softmax_scale, entries=entries)
        return self.output(self.expand.values(out[..., : config.kv_rank]).flatten(1))  # the rotated key carries no value


class Indexer(nn.Module):
    """V3.2: the tokens that each query attends to."""

    def __init__(self, config: DeepseekV3Config, index: int):
        super().__init__()
        self.index, self.heads, self.width, self.top_k = index, config.index_heads, config.index_width, config.index_top_k
        self.query = Linear(config.q_rank or 0, self.heads * self.width)
        self.weights = Linear(config.hidden_size, self.heads)
        self.key_norm = LayerNorm(self.width, eps=_LATENT_EPS)

    def forward(self, x: Tensor, residual: Tensor, rotation: Rotation, step: Step) -> Tensor | None:  # [tokens, hidden], [tokens, q_rank]
        q = rotation.half_split(self.query(residual).unflatten(-1, (self.heads, self.width)))
        return step.select(self.index, q, self.weights(x), self.top_k, (self.heads * self.width) ** -0.5)


class Router(nn.Module):
    """Sigmoid scores. A group of experts counts as much as its two best; experts are chosen from the best groups.

    The correction bias, which balances the experts' load, takes part in the choices only.
    """

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        self.config = config
        self.scores = RouterLinear(config.hidden_size, config.num_experts)
        self.correction = nn.Parameter(torch.empty(config.num_experts))  # [experts]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [tokens, hidden] -> chosen experts and their weights [tokens, experts a token]
        config = self.config
        logits = self.scores.precise(x)  # [tokens, experts]
        if routing.takes(logits):
            tiny, groups = 1e-20 if config.normalised else None, (config.num_groups, config.groups_per_token)
            choice = {"bias": self.correction, "groups": groups, "tiny": tiny, "scale": config.routed_scale}
            return routing.route(logits, config.experts_per_token, "sigmoid", torch.float32, **choice)
        scores = logits.sigmoid()
        by_group = (scores + self.correction).unflatten(1, (config.num_groups, -1))  # [tokens, groups, experts of a group]
        best = by_group.topk(min(2, by_group.shape[2]), dim=-1).values.sum(-1).topk(config.groups_per_token, dim=-1).indices
        outside = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, False)  # [tokens, groups]
        chosen = by_group.masked_fill(outside[..., None], -torch.inf).flatten(1).topk(config.experts_per_token, dim=-1).indices
        weights = scores.gather(1, chosen)
        if config.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * config.routed_scale


class Moe(nn.Module):
    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_width, swiglu)
        self.shared = GatedMlp(config.hidden_size, config.shared_width, swiglu)

    def forward(self, x: Tensor) -> Tensor:  # [tokens, hidden]
        return self.experts(x, *self.router(x), beside=self.shared(x))


class Block(nn.Module):
    def __init__(self, config: DeepseekV3Config, index: int):
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = GatedMlp(config.hidden_size, config.dense_width, swiglu) if config.dense[index] else Moe(config)

    def forward(self, x: Tensor, rotation: Rotation, step: Step) -> tuple[Tensor, Rotation, Step]:  # [tokens, hidden]
        normed = self.attention_norm(x)
        self.attention.append(normed, rotation, step)
        if step.narrows(self.index):
            kept, step = step.rows_kept, step.tail()
            x, normed, rotation = x[kept], normed[kept], rotation.at_rows(kept)
            if not len(x):
                return x, rotation, step
        x, normed = add_then_norm(x, self.attention(normed, rotation, step), self.mlp_norm)
        return add(x, self.mlp(normed)), rotation, step


class DeepseekV3(Decoder):
    unsupported = ("multi-token prediction (its tensors are not read)", "owner maps")

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout):
        read = DeepseekV3Config.read(config)
        super().__init__(layout, read.vocab_size, read.hidden_size, read.eps, read.tied)
        self.config = read
        self.blocks = nn.ModuleList(Block(self.config, index) for index in range(len(layout.layers)))
        self.keep_float32 = frozenset(name for name in self.state_dict() if name.endswith(".correction"))

    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] -> [rows kept, hidden]
        x = self.embedding(tokens)
        rotation = self.config.frequencies.at(step.positions, x.dtype)
        for block in self.blocks:
            x, rotation, step = block(x, rotation, step)
            if not len(x):  # a chunk inside a prompt: nobody asked for its logits
                break
        return self.norm(x)

    def weight_sources(self) -> dict[str, Source]:
        sources = self.base_sources()
        for name, _ in self.blocks.named_parameters():
            index, part = name.split(".", 1)
            layer = f"model.layers.{index}"
            if part.startswith("mlp.experts."):
                source = expert_sources(f"{layer}.mlp.experts", self.config.num_experts)[part.rpartition(".")[2]]
            elif part == "attention.expand.weight":
                source = Source((f"{layer}.self_attn.kv_b_proj.weight",), stack=self.config.num_heads)
            elif part == "mlp.router.correction":
                source = Source((f"{layer}.mlp.gate.e_score_correction_bias",))
            else:
                module, kind = part.rsplit(".", 1)
                source = Source(tuple(f"{layer}.{each}.{kind}" for each in self._names(module)))
            sources[f"blocks.{name}"] = source
        return sources

    def _names(self, module: str) -> tuple[str, ...]:
        """The modules of a checkpoint whose parameters lie in one of ours."""
        if module == "attention.cached" and not self.config.index_heads:
            return ("self_attn.kv_a_proj_with_mqa",)
        if module == "attention.query_up" and self.config.q_rank is None:
            return ("self_attn.q_proj",)
        return _BLOCK_NAMES[module]


_BLOCK_NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention.cached": ("self_attn.kv_a_proj_with_mqa", "self_attn.indexer.wk"),
    "attention.latent_norm": ("self_attn.kv_a_layernorm",),
    "attention.query_down": ("self_attn.q_a_proj",),
    "attention.query_norm": ("self_attn.q_a_layernorm",),
    "attention.query_up": ("self_attn.q_b_proj",),
    "attention.output": ("self_attn.o_proj",),
    "attention.indexer.query": ("self_attn.indexer.wq_b",),
    "attention.indexer.weights": ("self_attn.indexer.weights_proj",),
    "attention.indexer.key_norm": ("self_attn.indexer.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "mlp.router.scores": ("mlp.gate",),
    "mlp.shared.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared.down": ("mlp.shared_experts.down_proj",),
}

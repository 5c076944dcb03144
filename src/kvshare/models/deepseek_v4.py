"""DeepSeek V4 (2026): a window beside compressed entries, four residual streams, experts that are partly chosen by hashing.

One vector of `head_dim` numbers a token is key and value for all query heads. Every layer attends to the last `sliding_window`
of them; what lies further back it sees only as compressed entries: CSA layers (one entry for 4 tokens) let an indexer select
`index_topk` of them, HCA layers (one for 128) attend to all. An entry is visible once its block is complete; entries that overlap
the window are attended to as well.

Because K = V and keys are rotated, the values are rotated too: the output is rotated back at the query's position.

With `"cache_rounding": "published"` in the config, rows and indexer queries are rounded as DeepSeek's inference code rounds them (the
model was trained to bear it): 8 bits for the numbers that are not rotated, and a Hadamard transform and 4 bits in the indexer. The
precision "native" stores rows so rounded without further loss. transformers, the default here, rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvshare.cache.codecs.deepseek import BlockFloatCodec, hadamard
from kvshare.cache.step import Step
from kvshare.checkpoints.source import Source
from kvshare.errors import ConfigError
from kvshare.kernels import routing, small_ops
from kvshare.layers.activations import GatedActivation
from kvshare.layers.compressor import Blocks, Compressor, OpenBlocks
from kvshare.layers.embedding import Embedding
from kvshare.layers.experts import Experts
from kvshare.layers.gated_mlp import GatedMlp
from kvshare.layers.grouped_linear import GroupedLinear
from kvshare.layers.hyper_connections import HyperConnection, HyperHead, repeated
from kvshare.layers.linear import Linear, RouterLinear
from kvshare.layers.norm import RMSNorm
from kvshare.layers.rotary import Frequencies, Rotation, frequencies
from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.models.model import Model


@dataclass(frozen=True, slots=True)
class DeepseekV4Config:
    hidden_size: int
    vocab_size: int
    num_heads: int  # query heads
    head_dim: int  # of queries, and of the one key-value vector
    q_rank: int
    output_groups: int
    output_rank: int  # a group
    index_heads: int
    index_width: int
    index_top_k: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    routed_scale: float
    swiglu_limit: float
    hashed: tuple[bool, ...]  # whether a layer's experts are looked up by token id
    streams: int  # of the residual
    sinkhorn_iterations: int
    hc_eps: float
    eps: float
    rope: Mapping[str, Frequencies]  # "main" for layers with a window only, "compress" for the others
    rounds_cache: bool  # as the published inference code does

    @staticmethod
    def read(config: Mapping[str, Any]) -> DeepseekV4Config:
        fields = Fields(config)
        layers, width = fields.integer("num_hidden_layers"), fields.integer("moe_intermediate_size")
        if fields.get("tie_word_embeddings", False):
            raise ConfigError("tie_word_embeddings", "true: DeepSeek V4 has a head of its own")
        for name, known in (("hidden_act", "silu"), ("scoring_func", "sqrtsoftplus")):
            fields.choice(name, fields.get(name, known), {known: None})
        kinds = fields.list_of("mlp_layer_types", layers, str) or []
        num_hashed = fields.integer("num_hash_layers", 3, least=0)
        rounds = fields.choice("cache_rounding", fields.get("cache_rounding", "none"), {"none": False, "published": True})
        if rounds and fields.integer("index_head_dim").bit_count() != 1:
            raise ConfigError("cache_rounding", "published: the indexer's Hadamard transform needs a power of two as index_head_dim")
        return DeepseekV4Config(
            fields.integer("hidden_size"),
            fields.integer("vocab_size"),
            fields.integer("num_attention_heads"),
            fields.integer("head_dim"),
            fields.integer("q_lora_rank"),
            fields.integer("o_groups"),
            fields.integer("o_lora_rank"),
            fields.integer("index_n_heads"),
            fields.integer("index_head_dim"),
            fields.integer("index_topk"),
            fields.integer("n_routed_experts"),
            fields.integer("num_experts_per_tok"),
            width,
            width * fields.integer("n_shared_experts", 1),
            float(fields.get("routed_scaling_factor", 1.0)),
            float(fields.get("swiglu_limit", 10.0)),
            tuple(fields.choice("mlp_layer_types", kind, {"hash_moe": True, "moe": False}) for kind in kinds)
            or tuple(layer < num_hashed for layer in range(layers)),
            fields.integer("hc_mult", 4),
            fields.integer("hc_sinkhorn_iters", 20),
            float(fields.get("hc_eps", 1e-6)),
            float(fields.get("rms_norm_eps", 1e-6)),
            _rope(fields),
            rounds,
        )


def _rope(fields: Fields) -> dict[str, Frequencies]:
    """Frequencies of the rotated dims. Released configs have a `rope_scaling` for the compressed layers, re-saved ones name both kinds."""
    rotated = fields.integer("qk_rope_head_dim", int(fields.integer("head_dim") * float(fields.get("partial_rotary_factor", 0.125))))
    given = fields.mapping("rope_parameters")
    main = given.get("main") or {"rope_theta": fields.get("rope_theta", 10_000.0)}
    compress = given.get("compress") or {**fields.mapping("rope_scaling"), "rope_theta": fields.get("compress_rope_theta", 160_000.0)}
    compress = {"attention_factor": 1.0, **compress}  # YaRN would also lengthen the rotated vectors; V4 leaves that out
    return {name: frequencies({**rope, "partial_rotary_factor": 1.0}, rotated) for name, rope in (("main", main), ("compress", compress))}


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What all layers of a step share about its tokens."""

    ids: Tensor  # [tokens], for the layers that route by hash
    rotations: Mapping[str, Rotation]  # "main", "compress"
    backward: Mapping[str, Rotation]  # the rotations back
    blocks: Mapping[int, Blocks | OpenBlocks]  # by ratio

    def at_rows(self, rows: Tensor) -> TokenFacts:
        turns, back = ({name: each.at_rows(rows) for name, each in both.items()} for both in (self.rotations, self.backward))
        return TokenFacts(self.ids[rows], turns, back, self.blocks)


class Attention(nn.Module):
    """Window and compressed entries in one softmax, with a sink logit a head."""

    def __init__(self, config: DeepseekV4Config, layout: CacheLayout, index: int):
        super().__init__()
        self.index, self.num_heads, self.head_dim = index, config.num_heads, config.head_dim
        streams = {stream.name: stream for stream in layout.layers[index].streams}
        self.ratio = streams["entry"].tokens_per_row if "entry" in streams else 0
        self.rope = "compress" if self.ratio else "main"
        indexed = "index" in streams  # CSA: entries overlap, and an indexer selects them
        self.compressor = Compressor(self.head_dim, self.ratio, indexed, config.eps, index, "open") if self.ratio else None
        self.index_compressor = Compressor(config.index_width, self.ratio, True, config.eps, index, "open_index") if indexed else None
        self.rounding = {name: BlockFloatCodec(stream.native) for name, stream in streams.items() if config.rounds_cache and stream.native}
        self.index_heads, self.index_width, self.top_k = config.index_heads, config.index_width, config.index_top_k

        # everything that is cached, in one product: the key-value vector, then C and Z of each compressor
        compressors = [c for c in (self.compressor, self.index_compressor) if c is not None]
        self.cached_sizes = [self.head_dim, *(size for c in compressors for size in (c.projected, c.projected))]
        self.cached = Linear(config.hidden_size, sum(self.cached_sizes))
        self.kv_norm = RMSNorm(self.head_dim, config.eps)
        self.query_down = Linear(config.hidden_size, config.q_rank)
        self.query_norm = RMSNorm(config.q_rank, config.eps)
        self.query_up = Linear(config.q_rank, self.num_heads * self.head_dim)
        self.head_norm = RMSNorm(self.head_dim, config.eps, weighted=False)
        self.index_query = Linear(config.q_rank, self.index_heads * self.index_width) if indexed else None
        self.index_weights = Linear(config.hidden_size, self.index_heads) if indexed else None
        self.sinks = nn.Parameter(torch.empty(self.num_heads))  # [heads], logits
        self.output_groups = config.output_groups
        group_width = self.num_heads * self.head_dim // self.output_groups
        self.output_down = GroupedLinear(self.output_groups, group_width, config.output_rank)
        self.output_up = Linear(self.output_groups * config.output_rank, config.hidden_size)

    def append(self, x: Tensor, facts: TokenFacts, step: Step) -> None:  # [tokens, hidden]
        """The key-value vector of every token, rotated, and the entries and indexer keys of the blocks that these tokens complete."""
        kv, *projected = self.cached(x).split(self.cached_sizes, dim=-1)
        rows = {"kv": facts.rotations[self.rope].interleaved(self.kv_norm(kv)[:, None])}
        if self.compressor is not None:
            rows["entry"] = self.compressor(*projected[:2], facts.blocks[self.ratio], step)
        if self.index_compressor is not None:
            rows["index"] = self._index_space(self.index_compressor(*projected[2:], facts.blocks[self.ratio], step))
        step.append(self.index, {name: self._rounded(name, each) for name, each in rows.items()})

    def forward(self, x: Tensor, facts: TokenFacts, step: Step) -> Tensor:  # [tokens, hidden]
        rotation = facts.rotations[self.rope]
        residual = self.query_norm(self.query_down(x))  # [tokens, q_rank]
        q = self.head_norm(self.query_up(residual).unflatten(-1, (self.num_heads, self.head_dim)))
        entries = self._selected(x, residual, rotation, step)
        out = step.attend(self.index, rotation.interleaved(q), scale=self.head_dim**-0.5, sinks=self.sinks, entries=entries)
        heads = facts.backward[self.rope].interleaved(out).flatten(1)  # [tokens, heads * head_dim]
        low = self.output_down(heads.unflatten(1, (self.output_groups, -1)))  # [tokens, groups, output_rank]
        return self.output_up(low.flatten(1))

    def _selected(self, x: Tensor, residual: Tensor, rotation: Rotation, step: Step) -> Tensor | None:
        """CSA: the entries that the indexer selects for each query; None where all are attended to."""
        if self.index_query is None or self.index_weights is None:
            return None
        q = rotation.interleaved(self.index_query(residual).unflatten(-1, (self.index_heads, self.index_width)))
        scale = (self.index_heads * self.index_width) ** -0.5
        return step.select(self.index, self._rounded("index", self._index_space(q)), self.index_weights(x), self.top_k, scale)

    def _index_space(self, x: Tensor) -> Tensor:  # [..., heads, index_width]
        """Indexer queries and keys as they are compared: before 4 bits spread over all dimensions, which keeps inner products."""
        return hadamard(x) if self.rounding else x

    def _rounded(self, stream: str, x: Tensor) -> Tensor:  # [rows, heads, width]
        return self.rounding[stream].rounded(x) if self.rounding else x


class Router(nn.Module):
    """sqrt(softplus) scores weigh the experts.

    They also choose them, with a bias that balances the load; in the first layers a table looks the experts up by token id.
    """

    table: Tensor  # [vocab_size, experts a token]; only where experts are looked up

    def __init__(self, config: DeepseekV4Config, hashed: bool):
        super().__init__()
        self.experts_per_token, self.scale = config.experts_per_token, config.routed_scale
        self.scores = RouterLinear(config.hidden_size, config.num_experts)
        self.bias = None if hashed else nn.Parameter(torch.empty(config.num_experts))  # [experts]
        table = torch.empty(config.vocab_size, config.experts_per_token, dtype=torch.long) if hashed else None
        self.register_buffer("table", table)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:  # [tokens, hidden], [tokens] -> 2 x [tokens, experts a token]
        scores, k = self.scores(x), self.experts_per_token  # [tokens, experts]
        if routing.takes(scores) and ids.is_contiguous():
            lookup = (self.table, ids) if self.bias is None else None
            return routing.route(scores, k, "sqrt_softplus", x.dtype, bias=self.bias, lookup=lookup, tiny=1e-20, scale=self.scale)
        scores = F.softplus(scores.to(torch.promote_types(x.dtype, torch.float32))).sqrt()
        chosen = self.table[ids] if self.bias is None else (scores + self.bias).topk(k, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, (weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale).to(x.dtype)


class Moe(nn.Module):
    def __init__(self, config: DeepseekV4Config, index: int):
        super().__init__()
        activation = GatedActivation(limit=config.swiglu_limit)
        self.router = Router(config, config.hashed[index])
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_width, activation)
        self.shared = GatedMlp(config.hidden_size, config.shared_width, activation)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # [tokens, hidden], [tokens]
        return self.experts(x, *self.router(x, ids), beside=self.shared(x))


class Block(nn.Module):
    def __init__(self, config: DeepseekV4Config, layout: CacheLayout, index: int):
        super().__init__()
        self.index = index
        mixing = (config.hidden_size, config.streams, config.sinkhorn_iterations, config.eps, config.hc_eps)
        self.attention_mixing = HyperConnection(*mixing)
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layout, index)
        self.moe_mixing = HyperConnection(*mixing)
        self.moe_norm = RMSNorm(config.hidden_size, config.eps)
        self.moe = Moe(config, index)

    def forward(self, x: Tensor, facts: TokenFacts, step: Step) -> tuple[Tensor, TokenFacts, Step]:  # [tokens, streams, hidden]
        mixture = self.attention_mixing(x, self.attention_norm)
        self.attention.append(mixture.normed, facts, step)
        if step.narrows(self.index):
            kept, step = step.rows_kept, step.tail()
            x, mixture, facts = x[kept], mixture.at_rows(kept), facts.at_rows(kept)
            if not len(x):
                return x, facts, step
        x = mixture.expand(self.attention(mixture.normed, facts, step), x)
        mixture = self.moe_mixing(x, self.moe_norm)
        return mixture.expand(self.moe(mixture.normed, facts.ids), x), facts, step


class DeepseekV4(Model):
    released_as = ("published names, FP8 weights and packed FP4 experts",)
    unsupported = ("multi-token prediction (its tensors are not read)", "owner maps")

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout):
        super().__init__()
        self.config = DeepseekV4Config.read(config)
        self.layout, self.vocab_size = layout, self.config.vocab_size
        self.embedding = Embedding(self.vocab_size, self.config.hidden_size)
        self.blocks = nn.ModuleList(Block(self.config, layout, index) for index in range(len(layout.layers)))
        self.stream_head = HyperHead(self.config.hidden_size, self.config.streams, self.config.eps, self.config.hc_eps)
        self.norm = RMSNorm(self.config.hidden_size, self.config.eps)
        self.head = Linear(self.config.hidden_size, self.vocab_size)
        self.backward = {name: Frequencies(-waves.inverse, waves.factor) for name, waves in self.config.rope.items()}  # rotations back
        self.overlaps = {  # by ratio of the compressed layers: CSA's entries overlap
            stream.tokens_per_row: layer.kind == "csa" for layer in layout.layers for stream in layer.streams if stream.name == "entry"
        }
        self.open_states = {  # by ratio: one of the states that compressors keep
            stream.tokens_per_row: (index, layer.states[0].name)
            for index, layer in enumerate(layout.layers)
            for stream in layer.streams
            if stream.name == "entry"
        }
        self.keep_float32 = frozenset(name for name in self.state_dict() if _FLOAT32.intersection(name.split(".")))

    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] -> [rows kept, hidden]
        rope, x = self.config.rope, self.embedding(tokens)
        rotations = {name: each.at(step.positions, torch.float32) for name, each in rope.items()}
        backward = {name: each.at(step.positions, torch.float32) for name, each in self.backward.items()}
        facts = TokenFacts(tokens, rotations, backward, {ratio: self._blocks(step, ratio, x) for ratio in self.overlaps})
        x = repeated(x, self.config.streams)  # [tokens, streams, hidden]
        for block in self.blocks:
            x, facts, step = block(x, facts, step)
            if not len(x):  # a chunk inside a prompt: nobody asked for its logits
                break
        return self.stream_head(x, self.norm)

    def _blocks(self, step: Step, ratio: int, x: Tensor) -> Blocks | OpenBlocks:
        in_place = small_ops.takes(x) and step.state_in_place(*self.open_states[ratio]) is not None
        rope = self.config.rope["compress"]
        return OpenBlocks.of(step, ratio, rope) if in_place else Blocks.of(step, ratio, self.overlaps[ratio], rope)

    def logits(self, hidden: Tensor) -> Tensor:  # [rows, hidden] -> [rows, vocab_size]
        return self.head.scores(hidden)

    def weight_sources(self) -> dict[str, Source]:
        sources = {}
        for name, parameter in self.state_dict(keep_vars=True).items():
            released = self._released_names(name)
            saved = tuple(map(_saved_name, released))
            is_stack = name.endswith(".output_down.weight") or ".experts." in name  # matrices that lie one by one, or one below the other
            stack = len(parameter) if is_stack else None
            sources[name] = Source(released, otherwise=Source(saved, stack=stack), stack=stack)
        return sources

    def _released_names(self, name: str) -> tuple[str, ...]:
        """The tensors of a released checkpoint that make up one parameter."""
        if name in _TOP_NAMES:
            return (_TOP_NAMES[name],)
        _, index, part = name.split(".", 2)
        layer = f"layers.{index}"
        if part == "attention.cached.weight":
            streams = len(self.layout.layers[int(index)].streams)  # behind the first, each has a compressor: two projections
            return tuple(f"{layer}.{each}.weight" for each in _CACHED_NAMES[: 2 * streams - 1])
        if part.startswith("moe.experts."):
            halves = ("w1", "w3") if part.endswith("gate_up") else ("w2",)
            return tuple(f"{layer}.ffn.experts.{expert}.{half}.weight" for expert in range(self.config.num_experts) for half in halves)
        if part == "moe.shared.gate_up.weight":
            return f"{layer}.ffn.shared_experts.w1.weight", f"{layer}.ffn.shared_experts.w3.weight"
        for ours, released in _BLOCK_NAMES.items():
            if part.startswith(ours):
                return (f"{layer}.{released}{part.removeprefix(ours)}",)
        raise KeyError(name)


def _saved_name(name: str) -> str:
    """What transformers calls a released tensor when it saves the model again."""
    if name in _SAVED_NAMES:
        return _SAVED_NAMES[name]
    return f"model.{name}".replace(".attn.kv_norm.", ".attn.norm.")


_FLOAT32 = frozenset({"attention_mixing", "moe_mixing", "stream_head", "sinks", "ape", "bias"})
"""Parts of the names of parameters that are published in float32 and stay so."""

_TOP_NAMES = {
    "embedding.weight": "embed.weight",
    "stream_head.fn": "hc_head_fn",
    "stream_head.base": "hc_head_base",
    "stream_head.scale": "hc_head_scale",
    "norm.weight": "norm.weight",
    "head.weight": "head.weight",
}

_SAVED_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
    "head.weight": "head.weight",
}

_CACHED_NAMES = ("attn.wkv", "attn.compressor.wkv", "attn.compressor.wgate", "attn.indexer.compressor.wkv", "attn.indexer.compressor.wgate")

_BLOCK_NAMES = {  # prefixes of our names -> prefixes of the released ones
    "attention_mixing.": "hc_attn_",
    "attention_norm": "attn_norm",
    "attention.kv_norm": "attn.kv_norm",
    "attention.query_down": "attn.wq_a",
    "attention.query_norm": "attn.q_norm",
    "attention.query_up": "attn.wq_b",
    "attention.compressor": "attn.compressor",
    "attention.index_compressor": "attn.indexer.compressor",
    "attention.index_query": "attn.indexer.wq_b",
    "attention.index_weights": "attn.indexer.weights_proj",
    "attention.sinks": "attn.attn_sink",
    "attention.output_down": "attn.wo_a",
    "attention.output_up": "attn.wo_b",
    "moe_mixing.": "hc_ffn_",
    "moe_norm": "ffn_norm",
    "moe.router.scores": "ffn.gate",
    "moe.router.bias": "ffn.gate.bias",
    "moe.router.table": "ffn.gate.tid2eid",
    "moe.shared.down": "ffn.shared_experts.w2",
}

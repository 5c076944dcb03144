"""Gemma 4's drafter (multi-token prediction): four small layers without keys and values, which read the target's cache.

    x = W_pre [target's embedding of the newest token ; target's hidden state in front of it]
    hidden = norm(blocks(x))                 each block reads the target's last owner of its own kind
    next hidden state = W_post hidden        takes the place of the target's when the next token is drafted

All tokens of one draft are queried from the same position, that of the newest token, over the same rows: the drafter stores nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvshare.cache.draft_step import DraftStep
from kvshare.checkpoints.source import Source
from kvshare.errors import ConfigError
from kvshare.layers.embedding import Embedding
from kvshare.layers.key_from_value import KeyRotations
from kvshare.layers.linear import Linear
from kvshare.layers.norm import RMSNorm
from kvshare.layers.rotary import frequencies
from kvshare.layout import layout_from_config
from kvshare.layout.config import Fields
from kvshare.layout.rules.gemma import geometry
from kvshare.models.gemma4 import MODULE_NAMES, TENSOR_NAMES, Block, Gemma4, Gemma4Config
from kvshare.models.gemma_base import Context, block_sources, check_activation, rope_by_kind

_TYPES = {"sliding": "sliding_attention", "full": "full_attention"}


class Draft(NamedTuple):
    logits: Tensor  # [sequences, vocab_size]
    hidden: Tensor  # [sequences, backbone]: the hidden state to draft the token behind with


class CentroidHead(nn.Module):
    """Scores only the tokens of the clusters whose centroids score highest; all others get less than the least of these."""

    def __init__(self, hidden: int, vocab_size: int, clusters: int, top_k: int):
        super().__init__()
        self.clusters, self.top_k, self.vocab_size = clusters, top_k, vocab_size
        self.centroids = Linear(hidden, clusters)
        self.ordering = nn.Buffer(torch.empty(vocab_size, dtype=torch.int64))  # [vocab_size]: the tokens, cluster by cluster

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:  # [rows, hidden], [vocab_size, hidden] -> [rows, vocab_size]
        best = self.centroids(hidden).topk(self.top_k, dim=-1).indices  # [rows, top_k]
        tokens = self.ordering.view(self.clusters, -1)[best].flatten(1)  # [rows, tokens of the clusters]
        scores = (embedding[tokens] @ hidden[:, :, None])[..., 0]
        others = scores.min(dim=-1, keepdim=True).values - 1.0
        return others.expand(-1, self.vocab_size).scatter(1, tokens, scores)


class Gemma4Assistant(nn.Module):
    """Bound to its target for life: it embeds with the target's table and reads the target's layers."""

    def __init__(self, config: Mapping[str, Any], target: Gemma4):
        """Raises `ConfigError` where the drafter was made for another model."""
        super().__init__()
        fields = Fields(config)
        check_activation(fields)
        for name in ("hidden_size_per_layer_input", "enable_moe_block"):
            if fields.get(name):
                raise ConfigError(name, f"{fields.get(name)}: a drafter has neither per-layer embeddings nor experts")
        read = Gemma4Config.read({**config, "hidden_size_per_layer_input": 0})
        self.vocab_size, backbone = fields.integer("vocab_size"), fields.integer("backbone_hidden_size", 1536)
        for name, mine, theirs in (
            ("backbone_hidden_size", backbone, target.hidden_size),
            ("vocab_size", self.vocab_size, target.vocab_size),
        ):
            if mine != theirs:
                raise ConfigError(name, f"{mine}, but the model to draft for has {theirs}: this drafter was made for another one")
        kinds = [layer.kind for layer in layout_from_config(config).layers]
        self.owner = tuple(_owner(fields, index, kind, target) for index, kind in enumerate(kinds))
        rope, streams = rope_by_kind(fields), [target.layout.streams_of(owner) for owner in self.owner]
        self.frequencies = {kind: frequencies(rope[kind], stream[0].width) for kind, stream in zip(kinds, streams, strict=True)}
        rotations = KeyRotations(self.frequencies["full"])
        blocks = [Block(read, index, kind, streams[index], False, rotations) for index, kind in enumerate(kinds)]
        for block, owner in zip(blocks, self.owner, strict=True):
            block.attention.index = owner
            block.attention.rebuild = target.key_rebuild(owner)
        self.blocks = nn.ModuleList(blocks)
        self.embed_for_target = target.embed
        self.pre_projection = Linear(2 * backbone, read.hidden_size)
        self.post_projection = Linear(read.hidden_size, backbone)
        self.norm = RMSNorm(read.hidden_size, read.eps)
        self.embedding = Embedding(self.vocab_size, read.hidden_size)  # the head's only: a drafter is fed its target's rows
        self.centroid_head = None
        if fields.get("use_ordered_embeddings", False):
            clusters, top_k = fields.integer("num_centroids", 2048), fields.integer("centroid_intermediate_top_k", 32)
            self.centroid_head = CentroidHead(read.hidden_size, self.vocab_size, clusters, top_k)

    def forward(
        self,
        tokens: Tensor,  # [sequences], the newest token of each: sampled or drafted, not yet in the target's cache
        hidden: Tensor,  # [sequences, backbone]: the target's behind its final norm, or the last draft's
        step: DraftStep,  # over the target's caches
    ) -> Draft:
        """Scores of the token behind the newest one. Further tokens of the draft take the same step."""
        x = self.pre_projection(torch.cat([self.embed_for_target(tokens), hidden], dim=-1))
        positions = step.positions + 1  # of the first newest token, which stands behind what is cached
        context = Context(step, {kind: table.at(positions, x.dtype) for kind, table in self.frequencies.items()})
        for block in self.blocks:
            x, context = block(x, context)
        x = self.norm(x)
        logits = self.embedding.scores(x) if self.centroid_head is None else self.centroid_head(x, self.embedding.weight)
        return Draft(logits, self.post_projection(x))

    def weight_sources(self) -> dict[str, Source]:
        sources = {"embedding.weight": Source(("model.embed_tokens.weight",)), "norm.weight": Source(("model.norm.weight",))}
        sources |= {f"{name}.weight": Source((f"{name}.weight",)) for name in ("pre_projection", "post_projection")}
        if self.centroid_head is not None:
            sources["centroid_head.centroids.weight"] = Source(("masked_embedding.centroids.weight",))
            sources["centroid_head.ordering"] = Source(("masked_embedding.token_ordering",))
        return sources | block_sources(self.blocks, MODULE_NAMES, TENSOR_NAMES)


def _owner(fields: Fields, index: int, kind: str, target: Gemma4) -> int:
    """The target's layer that the drafter's layer `index` reads."""
    try:
        owner = target.layout.last_owner(kind)
    except KeyError:
        raise ConfigError("layer_types", f"layer {index} would read a {kind} layer, but the model to draft for has none") from None
    stream = target.layout.streams_of(owner)[0]
    mine = geometry(fields, index, _TYPES[kind])
    if mine != (stream.heads, stream.width):
        raise ConfigError(
            "head_dim",
            f"layer {index} reads {mine[0]} key-value heads of {mine[1]}, but layer {owner} of the model to draft for stores "
            f"{stream.heads} of {stream.width}: this drafter was made for another one",
        )
    return owner

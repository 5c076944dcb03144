"""What Gemma 3, 3n and 4 have in common: scaled embeddings, a rotation for each kind of layer, a soft cap on the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.cache.step import Step
from kvshare.checkpoints.source import Source
from kvshare.errors import ConfigError
from kvshare.kernels import small_ops
from kvshare.layers.key_balance import key_balance
from kvshare.layers.per_layer_embedding import PerLayerInputs
from kvshare.layers.rotary import Frequencies, Rotation, frequencies
from kvshare.layout import CacheLayout
from kvshare.layout.config import Fields
from kvshare.models.decoder import Decoder
from kvshare.models.gemma_attention import Attention

_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0


@dataclass(frozen=True, slots=True)
class Context:
    """What goes along with the hidden rows through the layers of one step."""

    step: Step
    rotations: Mapping[str, Rotation]  # by kind of layer: "sliding", "full"
    inputs: PerLayerInputs | None = None

    def narrowed(self, layer: int) -> Context:
        """The same for the rows that go on behind `layer`'s append."""
        rows = self.step.rows_kept
        rotations = {kind: rotation.at_rows(rows) for kind, rotation in self.rotations.items()}
        inputs = None if self.inputs is None else self.inputs.at_rows(rows, layer)
        return replace(self, step=self.step.tail(), rotations=rotations, inputs=inputs)


def rope_by_kind(fields: Fields) -> dict[str, Mapping[str, Any]]:
    """Rope parameters of sliding and full layers, from `rope_parameters` or from the older fields.

    Older configs keep `rope_theta` and `rope_scaling` for the full layers, `rope_local_base_freq` for the sliding ones.
    """
    given = fields.mapping("rope_parameters")
    scaling = fields.mapping("rope_scaling")
    full = given.get("full_attention") or {"rope_theta": fields.get("rope_theta", _GLOBAL_THETA), **scaling}
    sliding = given.get("sliding_attention") or {"rope_theta": fields.get("rope_local_base_freq", _LOCAL_THETA)}
    return {"full": full, "sliding": sliding}


def check_activation(fields: Fields) -> None:
    """Raise `ConfigError` unless the feed-forward layers use the tanh form of GELU, as every released Gemma does."""
    name = fields.get("hidden_activation", "gelu_pytorch_tanh")
    if name != "gelu_pytorch_tanh":
        raise ConfigError("hidden_activation", f"{name!r}: Gemma models run with gelu_pytorch_tanh only")


class GemmaModel(Decoder):
    """A decoder whose embedding is scaled and whose logits are capped; families add their blocks."""

    blocks: nn.ModuleList

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout, norm_offset: float = 0.0):
        fields = Fields(config)
        check_activation(fields)
        vocab_size, hidden_size, tied = fields.integer("vocab_size"), fields.integer("hidden_size"), fields.get("tie_word_embeddings", True)
        super().__init__(layout, vocab_size, hidden_size, float(fields.get("rms_norm_eps", 1e-6)), bool(tied), norm_offset)
        self.hidden_size = hidden_size
        cap = fields.get("final_logit_softcapping")
        self.softcap = None if cap is None else float(cap)
        rope = rope_by_kind(fields)
        widths = {layer.kind: layout.streams_of(index)[0].width for index, layer in enumerate(layout.layers)}
        self.frequencies: dict[str, Frequencies] = {kind: frequencies(rope[kind], width) for kind, width in widths.items()}

    def embed(self, tokens: Tensor) -> Tensor:  # [tokens] -> [tokens, hidden]
        return self.embedding(tokens, self.hidden_size**0.5)

    def context(self, step: Step, dtype: torch.dtype, inputs: PerLayerInputs | None = None) -> Context:
        return Context(step, {kind: table.at(step.positions, dtype) for kind, table in self.frequencies.items()}, inputs)

    def key_balance(self) -> Mapping[int, Tensor]:
        return key_balance(self.layout, self.blocks, lambda layer: len(self.frequencies[self.layout.layers[layer].kind].inverse))

    def logits(self, hidden: Tensor) -> Tensor:  # [rows, hidden] -> [rows, vocab_size]
        scores = super().logits(hidden)
        return scores if self.softcap is None else capped(scores, self.softcap)


def capped(scores: Tensor, cap: float) -> Tensor:  # [rows, vocab_size]; may be changed in place
    """Scores that go from -cap to cap."""
    if scores.dtype == torch.float32 and scores.is_contiguous() and small_ops.takes(scores):
        return small_ops.cap_(scores, cap)
    return torch.tanh(scores / cap) * cap


def per_layer_sources() -> dict[str, Source]:
    """Where the parameters of a model's `per_layer` (a `PerLayerEmbedding`) come from."""
    return {
        "per_layer.table": Source(("model.embed_tokens_per_layer.weight",)),
        "per_layer.projection.weight": Source(("model.per_layer_model_projection.weight",)),
        "per_layer.norm.weight": Source(("model.per_layer_projection_norm.weight",)),
    }


def block_sources(blocks: nn.ModuleList, modules: Mapping[str, tuple[str, ...]], tensors: Mapping[str, str]) -> dict[str, Source]:
    """Where the parameters of `blocks` come from.

    `modules` names the checkpoint's modules that make up one of a block's, `tensors` those parameters that are no module's
    weight; what lies in a block's `attention` names itself.
    """
    sources = {}
    for name in blocks.state_dict():
        index, part = name.split(".", 1)
        module, _, kind = part.rpartition(".")
        if part in tensors:
            names: tuple[str, ...] = (tensors[part],)
        else:
            parent, _, child = module.rpartition(".")
            attention = blocks[int(index)].attention
            own = attention.names(child) if parent == "attention" and isinstance(attention, Attention) else modules[module]
            names = tuple(f"{each}.{kind}" for each in own)
        sources[f"blocks.{name}"] = Source(tuple(f"model.layers.{index}.{each}" for each in names))
    return sources

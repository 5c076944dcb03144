"""The least that a model must do: bytes that a decode step reads, operations that a prompt takes. From its structure, not from a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvshare.kernels.quantized_weight import QuantizedWeight
from kvshare.layers.experts import Experts
from kvshare.layout import CacheLayout, PrecisionChoice, Stream, layout_from_config
from kvshare.layout.config import Fields, text_config
from kvshare.models.model import Model


def weight_bytes(model: Model) -> int | None:
    """Bytes of weights that one decode step reads, as they are stored in this model (on the meta device: as they would be).

    Tables of which a step reads a few rows are left out: per-layer embeddings, and the embedding where the head is another matrix.
    None for models with routed experts: which of them a step reads depends on the tokens.
    """
    if any(isinstance(module, Experts) for module in model.modules()):
        return None
    tables = set(model.memory_mapped)
    if getattr(model, "head", None) is not None:
        tables.add("embedding.weight")
    total = sum(tensor.nbytes for name, tensor in model.named_parameters() if name not in tables)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedWeight) and f"{name}.weight" not in tables:
            total += weight.nbytes
    return total


def step_bytes(weights: int, layout: CacheLayout, context: int, batch: int, precision: PrecisionChoice) -> int:
    """Bytes that one decode step of `batch` sequences reads: weights once, each sequence's rows in every layer that attends to them.

    A reader reads its owner's rows again: sharing saves memory, not reading.
    """
    return weights + layout.read_bytes(context, batch, precision)


def prompt_flops(model: Model, config: Mapping[str, Any], context: int) -> int | None:
    """Operations (two for each multiplied pair) that a prompt of `context` tokens needs until its first token is known.

    Layers up to the last owner run on every row, the tail behind it and the head on one. (An engine may leave out what the last owner
    does behind its keys and values: it is counted.) `model` is unquantized, and may lie on the meta device.
    None for families whose attention is not over plain keys and values, and for routed experts.
    """
    fields, layout = Fields(text_config(config)), layout_from_config(config)
    if any({stream.name for stream in layout.streams_of(index)} != {"k", "v"} for index in range(len(layout.layers))):
        return None
    if any(isinstance(module, Experts) for module in model.modules()):
        return None
    every_row = last_row = 0  # weights that meet every row of the prompt, and only the last one
    for name, weight in model.named_parameters():
        if weight.dim() != 2 or name in model.memory_mapped:
            continue
        part, _, rest = name.partition(".")
        if part == "blocks" and int(rest.partition(".")[0]) < layout.tail:
            every_row += weight.numel()
        elif name == "per_layer.projection.weight":  # a part for each layer
            every_row += weight.numel() * layout.tail // len(layout.layers)
        elif part == "blocks" or part == "head" or (part == "embedding" and getattr(model, "head", None) is None):
            last_row += weight.numel()
    listed = "num_attention_heads_per_layer"
    heads = fields.per_layer(listed if fields.has(listed) else "num_attention_heads", len(layout.layers))
    attention = 0
    for index in range(len(layout.layers)):
        keys, values = (next(s for s in layout.streams_of(index) if s.name == name) for name in ("k", "v"))
        pairs = _pairs(keys, context) if index < layout.tail else keys.live_rows(context)
        attention += heads[index] * (keys.width + values.width) * pairs
    return 2 * (every_row * context + last_row + attention)


def _pairs(stream: Stream, tokens: int) -> int:
    """Rows that the queries of a whole prompt attend to, added up."""
    window = min(stream.window or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window

"""The least that a model must do: bytes that a decode step reads, operations that a prompt takes. From its structure, not from a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.kernels.quantized_weight import QuantizedWeight
from kvshare.layers.experts import RoutedExperts
from kvshare.layout import CacheLayout, PrecisionChoice, Stream, layout_from_config
from kvshare.layout.config import Fields, text_config
from kvshare.models.model import Model


class WeightBytes(NamedTuple):
    whole: int  # of the weights that one decode step reads, however many tokens it has
    rows: int  # of the rows of tables that it reads for each token: per-layer embeddings, the embedding where the head is another matrix


class PromptFlops(NamedTuple):
    """Operations, two for each multiplied pair, that a prompt needs until its first token is known."""

    prompt_flops: int  # layers up to the last owner on every row, the tail behind it and the head on one
    least_flops: int  # and of the last owner keys and values alone on every row: nobody reads what else it makes of them


def weight_bytes(model: Model) -> WeightBytes | None:
    """As they are stored in this model (on the meta device: as they would be).

    None for models with routed experts: which of them a step reads depends on the tokens.
    """
    if any(isinstance(module, RoutedExperts) for module in model.modules()):
        return None
    tables = set(model.memory_mapped)
    if getattr(model, "head", None) is not None:
        tables.add("embedding.weight")
    whole = rows = 0
    for name, tensor in model.named_parameters():
        if name in tables:
            rows += tensor.nbytes // tensor.shape[0]
        else:
            whole += tensor.nbytes
    for name, module in model.named_modules():
        weight, table = getattr(module, "weight", None), getattr(module, "table", None)
        if isinstance(table, PackedBlocks) and (f"{name}.table" in tables or f"{name}.weight" in tables):
            rows += table.blocks.nbytes // table.shape[0]
        elif isinstance(weight, QuantizedWeight):
            whole += weight.nbytes
    return WeightBytes(whole, rows)


def step_bytes(weights: WeightBytes, layout: CacheLayout, context: int, batch: int, precision: PrecisionChoice) -> int:
    """Bytes that one decode step of `batch` sequences reads: weights once, each sequence's rows in every layer that attends to them.

    A reader reads its owner's rows again: sharing saves memory, not reading.
    """
    return weights.whole + batch * weights.rows + layout.read_bytes(context, batch, precision)


def prompt_flops(model: Model, config: Mapping[str, Any], context: int) -> PromptFlops | None:
    """For a prompt of `context` tokens. `model` is unquantized, and may lie on the meta device.

    None for families whose attention is not over plain keys and values, and for routed experts.
    """
    fields, layout = Fields(text_config(config)), layout_from_config(config)
    if any({stream.name for stream in layout.streams_of(index)} != {"k", "v"} for index in range(len(layout.layers))):
        return None
    if any(isinstance(module, RoutedExperts) for module in model.modules()):
        return None
    listed = "num_attention_heads_per_layer"
    heads = fields.per_layer(listed if fields.has(listed) else "num_attention_heads", len(layout.layers))

    def operations(wide: int) -> int:
        """Where the first `wide` layers run on every row, those behind them on the last one."""
        every_row = last_row = 0  # weights that meet every row of the prompt, and only the last one
        for name, weight in model.named_parameters():
            if weight.dim() != 2 or name in model.memory_mapped:
                continue
            part, _, rest = name.partition(".")
            if part == "blocks" and int(rest.partition(".")[0]) < wide:
                every_row += weight.numel()
            elif name == "per_layer.projection.weight":  # a part for each layer
                own = weight.numel() * wide // len(layout.layers)
                every_row, last_row = every_row + own, last_row + weight.numel() - own
            elif part == "blocks" or part == "head" or (part == "embedding" and getattr(model, "head", None) is None):
                last_row += weight.numel()
        attention = 0
        for index in range(len(layout.layers)):
            keys, values = (next(s for s in layout.streams_of(index) if s.name == name) for name in ("k", "v"))
            pairs = _pairs(keys, context) if index < wide else keys.live_rows(context)
            attention += heads[index] * (keys.width + values.width) * pairs
        return 2 * (every_row * context + last_row + attention)

    projected = sum(stream.heads * stream.width for stream in layout.streams_of(layout.tail - 1)) * fields.integer("hidden_size")
    return PromptFlops(operations(layout.tail), operations(layout.tail - 1) + 2 * (context - 1) * projected)


def _pairs(stream: Stream, tokens: int) -> int:
    """Rows that the queries of a whole prompt attend to, added up."""
    window = min(stream.window or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window

"""Layers that may multiply with quantized blocks: linear layers, embeddings and experts. Which they are, and what stands in for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from kvshare.checkpoints.block_encoding import GROUP
from kvshare.checkpoints.checkpoint import Checkpoint
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.resident import ResidentMemory
from kvshare.checkpoints.source import Source
from kvshare.kernels.interleaved_blocks import InterleavedBlocks
from kvshare.kernels.quantized_weight import BLOCK_TYPES, ActivationWidth
from kvshare.layers.embedding import Embedding
from kvshare.layers.experts import Experts
from kvshare.layers.linear import Linear, RouterLinear
from kvshare.layers.quantized_embedding import QuantizedEmbedding
from kvshare.layers.quantized_experts import QuantizedExperts
from kvshare.layers.quantized_linear import QuantizedLinear

_Part = PackedBlocks | InterleavedBlocks | Tensor


def block_matrices(model: nn.Module, sources: Mapping[str, Source]) -> dict[str, tuple[str, ...]]:
    """By the layers' paths, the names of their weights. Layers whose rows are not whole groups are not among them, nor are routers."""
    found = {}
    for path, weights in _matrices(model):
        names = tuple(f"{path}.{name}" for name in weights)
        if all(weight.shape[-1] % GROUP == 0 for weight in weights.values()) and all(sources[name].combine is None for name in names):
            found[path] = names
    return found


def rows_without_blocks(model: nn.Module) -> dict[str, list[int]]:
    """By the paths of the layers that `block_matrices` leaves out for it: the widths of rows that are not whole groups."""
    widths = {path: sorted({w.shape[-1] for w in weights.values() if w.shape[-1] % GROUP}) for path, weights in _matrices(model)}
    return {path: found for path, found in widths.items() if found}


def _matrices(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Path and weights of each layer that is kept in blocks where its file has some, and its rows are made for it."""
    for path, layer in model.named_modules():
        if isinstance(layer, Experts):
            yield path, {"gate_up": layer.gate_up, "down": layer.down}
        elif isinstance(layer, Linear | Embedding) and not isinstance(layer, RouterLinear):
            yield path, {"weight": layer.weight}


def layers_in_blocks(model: nn.Module, sources: Mapping[str, Source], checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Those of `block_matrices` that stay blocks: of each weight the checkpoint holds a part in blocks that the kernels multiply."""

    def stays(name: str) -> bool:
        kept = {part.type.name for part in map(checkpoint.packed, sources[name].names) if part is not None}
        return bool(kept) and kept <= set(BLOCK_TYPES)

    return {path: names for path, names in block_matrices(model, sources).items() if all(map(stays, names))}


def has_blocks(model: nn.Module) -> bool:
    """Whether any of its weights are multiplied as quantized blocks."""
    return any(isinstance(module, QuantizedLinear | QuantizedEmbedding | QuantizedExperts) for module in model.modules())


def put_block_layer(
    model: nn.Module,
    path: str,
    sources: Sequence[Source],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    resident: ResidentMemory | None,
    activations: ActivationWidth,
) -> None:
    """Put a layer that multiplies with blocks in the place of the one at `path`, whose weights come from `sources`."""
    weights = [list(_parts(source, checkpoint, resident)) for source in sources]
    model.set_submodule(path, _block_layer(model.get_submodule(path), weights, dtype, activations))


def _parts(source: Source, checkpoint: Checkpoint, resident: ResidentMemory | None) -> Iterator[_Part]:
    """The source's tensors as matrices [rows, columns], which lie behind one another wherever `resident` has room."""
    for name in source.names:
        packed = checkpoint.packed(name)
        if packed is not None:
            yield resident.hold_blocks(packed.as_matrix()) if resident else packed.as_matrix()
        else:
            plain = checkpoint.get(name, torch.bfloat16).contiguous().flatten(0, -2)
            yield resident.hold(plain) if resident else plain


def _block_layer(layer: nn.Module, weights: Sequence[Sequence[_Part]], dtype: torch.dtype, activations: ActivationWidth) -> nn.Module:
    """What stands in for `layer`, each of whose weights is these parts, one below the other."""
    if isinstance(layer, Experts):
        gate_up, down = weights
        return QuantizedExperts(layer.num_experts, gate_up, down, layer.activation, activations)
    (parts,) = weights
    if isinstance(layer, Embedding):
        (table,) = parts
        assert isinstance(table, PackedBlocks | InterleavedBlocks)
        return QuantizedEmbedding(table, dtype, activations)
    assert isinstance(layer, Linear)
    return QuantizedLinear(parts, layer.bias, activations)

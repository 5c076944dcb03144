"""Quantizing at load: a checkpoint whose plain matrices appear as blocks, made once and then mapped from the user's cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvshare.checkpoints.block_encoding import GROUP, block_type, encode_blocks, encoded_rows
from kvshare.checkpoints.block_layers import block_matrices, rows_without_blocks
from kvshare.checkpoints.checkpoint import Checkpoint
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.progress import Notice, Progress, ignore
from kvshare.checkpoints.weight_cache import Entry, Unusable, WeightCache
from kvshare.checkpoints.weights import matched_sources

if TYPE_CHECKING:
    from kvshare.checkpoints.tokenizer import Tokenizer


class QuantizedCheckpoint:
    """`checkpoint`, with `blocks` in the place of the tensors of these names."""

    def __init__(self, checkpoint: Checkpoint, blocks: Mapping[str, PackedBlocks]):
        self._checkpoint, self._blocks = checkpoint, blocks

    @property
    def origin(self) -> str:
        return self._checkpoint.origin

    @property
    def files(self) -> tuple[Path, ...]:
        return self._checkpoint.files

    @property
    def config(self) -> dict[str, Any]:
        return self._checkpoint.config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._checkpoint.generation_config

    @property
    def skipped(self) -> tuple[str, ...]:
        return self._checkpoint.skipped

    def names(self) -> frozenset[str]:
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        packed = self._blocks.get(name)
        return self._checkpoint.get(name, dtype) if packed is None else packed.dequantize(dtype or torch.float32)

    def packed(self, name: str) -> PackedBlocks | None:
        return self._blocks.get(name) or self._checkpoint.packed(name)

    def tokenizer(self) -> Tokenizer:
        return self._checkpoint.tokenizer()


def quantize(
    model: nn.Module,
    checkpoint: Checkpoint,
    precision: str,
    *,
    cached: bool = True,
    progress: Progress | None = None,
    notice: Notice = ignore,
) -> Checkpoint:
    """`checkpoint` with the matrices that `model` multiplies with and the tables that it maps in "int8" or "int4".

    What the file holds in blocks already stays as it is. With `cached` the blocks are written to the user's cache, tensor by tensor, and
    mapped from there, the next time at once; without, or where that cannot be written, they are kept in memory.
    Raises `CheckpointError` for a checkpoint that is not `model`'s, before anything is read.
    """
    entries = [
        Entry(name, block_type(precision, shape[-1]), shape)
        for name in plain_matrices(model, checkpoint)
        for shape in (checkpoint.shape(name),)
    ]
    plain = rows_without_blocks(model)
    if plain:
        widths, first = ", ".join(map(str, sorted({width for found in plain.values() for width in found}))), next(iter(plain))
        notice(f"weights: {len(plain):,} layers stay plain: rows of {widths} numbers are not whole blocks of {GROUP} ({first}, ...)")
    if not entries:
        return checkpoint
    cache = WeightCache(checkpoint, precision, entries)
    size = f"{precision}, {cache.nbytes / 1e9:,.3f} GB"
    if cached:
        try:
            blocks = _cached(cache, checkpoint, progress, notice)
        except OSError as error:
            notice(f"{cache.path} cannot be written ({error}): set KVSHARE_CACHE to another directory. The weights are quantized in memory")
        else:
            notice(f"weights: {size} mapped from {cache.path}")
            return QuantizedCheckpoint(checkpoint, blocks)
    done, blocks = 0, {}
    for entry in entries:
        blocks[entry.name] = encode_blocks(checkpoint.get(entry.name), entry.form)
        done += blocks[entry.name].blocks.nbytes
        if progress:
            progress(done, cache.nbytes)
    notice(f"weights: {size} in memory")
    return QuantizedCheckpoint(checkpoint, blocks)


def plain_matrices(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The checkpoint's tensors that may be quantized and are not yet: weights of linear layers, embeddings and experts, and mapped tables.

    Raises `CheckpointError` for a checkpoint that is not `model`'s.
    """
    sources = matched_sources(model, checkpoint)
    weights = [name for names in block_matrices(model, sources).values() for name in names]
    tables = [name for name in getattr(model, "memory_mapped", ()) if name in sources and sources[name].combine is None]  # not all have one
    parts = dict.fromkeys(part for name in (*weights, *tables) for part in sources[name].names)
    return tuple(part for part in parts if checkpoint.shape(part)[-1] % GROUP == 0 and checkpoint.packed(part) is None)


def _cached(cache: WeightCache, checkpoint: Checkpoint, progress: Progress | None, notice: Notice) -> dict[str, PackedBlocks]:
    try:
        return cache.open()
    except Unusable:
        return cache.make(lambda entry: encoded_rows(checkpoint.get(entry.name), entry.form), progress, notice)

"""A GGUF file as a checkpoint: Hugging Face's names and numbers, blocks left in the mapped file until somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvshare.checkpoints.gguf_blocks import DECODERS, PackedBlocks
from kvshare.checkpoints.gguf_config import config_from_header
from kvshare.checkpoints.gguf_header import TensorInfo, read_header
from kvshare.checkpoints.gguf_names import NAMINGS, Change, Place
from kvshare.errors import CheckpointError

if TYPE_CHECKING:
    from kvshare.checkpoints.tokenizer import Tokenizer

_PLAIN: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}


class GGUFCheckpoint:
    """The header is read and checked when the file is opened; no tensor is touched before it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._header = read_header(path)
        parts = self._header.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(f"{path} is one of {parts} parts: join them with `llama-gguf-split --merge` and open the result")
        self.config: dict[str, Any] = config_from_header(self._header)
        shapes = {name: info.shape for name, info in self._header.tensors.items()}
        self._places, self.skipped = NAMINGS[self._header.architecture].places(shapes)

    @property
    def origin(self) -> str:
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def generation_config(self) -> dict[str, Any]:
        metadata = self._header.metadata
        found = {ours: metadata.get(f"general.sampling.{theirs}") for theirs, ours in _SAMPLING.items()}
        return {name: value for name, value in found.items() if value is not None}

    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        place, info = self._find(name)
        return info.shape if place.part is None else info.shape[1:]

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        place, info = self._find(name)
        packed = self.packed(name)
        if packed is not None:
            return packed.dequantize(dtype or torch.float32)
        tensor = self._bytes(info).view(_PLAIN[info.type.name]).view(info.shape)
        if place.part is not None:
            tensor = tensor[place.part]
        if place.change is Change.NORM_PLUS_ONE:
            tensor = tensor.float() - 1
        elif place.change is Change.ROTARY_ORDER:
            tensor = tensor[self._rotary_order(name, len(tensor))]
        return tensor.to(dtype)

    def packed(self, name: str) -> PackedBlocks | None:
        place, info = self._find(name)
        if info.type.name not in DECODERS:
            return None
        if place.change is Change.NORM_PLUS_ONE:
            raise CheckpointError(f"{self.path}: the norm {info.name!r} is quantized ({info.type.name}); norms are kept in F32")
        row_bytes = info.shape[-1] // info.type.block_size * info.type.block_bytes
        blocks = PackedBlocks(info.type, info.shape, self._bytes(info).view(-1, row_bytes))
        if place.part is not None:
            return blocks.part(place.part)
        if place.change is Change.ROTARY_ORDER:
            return blocks.reordered(self._rotary_order(name, info.shape[0]))
        return blocks

    def tokenizer(self) -> Tokenizer:
        from kvshare.checkpoints.gguf_tokenizer import tokenizer_from_metadata

        return tokenizer_from_metadata(self._header.metadata, self.config, self.origin)

    @cached_property
    def _file(self) -> Tensor:
        """The whole file, mapped: uint8 [file size]. Writes would go to a private copy, never to the file."""
        size = self.path.stat().st_size
        return torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)

    def _bytes(self, info: TensorInfo) -> Tensor:
        return self._file[info.offset : info.offset + info.num_bytes]

    def _find(self, name: str) -> tuple[Place, TensorInfo]:
        if name not in self._places:
            raise CheckpointError(f"{self.origin}: no tensor {name!r} among the {len(self._places)} of the language model")
        place = self._places[name]
        return place, self._header.tensors[place.name]

    def _rotary_order(self, name: str, rows: int) -> Tensor:
        """Where each row of a rotated projection stands in the file: pairs (i, i + d/2) of a head stand there side by side."""
        heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        if rows % (2 * heads):
            raise CheckpointError(f"{self.origin}: {name} has {rows} rows, which {heads} heads do not divide")
        return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).flatten()

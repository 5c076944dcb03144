"""`Checkpoint`: a model's weights, config and tokenizer on disk, whatever the file format. Nothing is read before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from kvshare.checkpoints.gguf_blocks import PackedBlocks
    from kvshare.checkpoints.tokenizer import Tokenizer


class Checkpoint(Protocol):
    """What a loader sees. Tensor names are those of Hugging Face's text models: `model.layers.0.self_attn.q_proj.weight`."""

    @property
    def origin(self) -> str:
        """Which files these are, for people."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The language model's config, in Hugging Face's shape and with `text_config` unnested."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """Defaults for sampling and the ids that end a text; empty where the checkpoint has none."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names, as the file has them, of tensors that belong to no language model: image and audio towers and their projections."""
        ...

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape of a tensor, from the file's header: no data is read. Raises `CheckpointError` for a name that is not there."""
        ...

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in `dtype`, or in the file's own (float32 where that is quantized).

        A view of the memory-mapped file where the format allows and the dtype is the file's (never write to it), else fresh.
        """
        ...

    def packed(self, name: str) -> PackedBlocks | None:
        """The tensor's quantized blocks as the file has them, memory-mapped; None where it is stored as plain numbers."""
        ...

    def tokenizer(self) -> Tokenizer: ...

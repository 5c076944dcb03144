"""8-bit weights with a scale for each block, and DeepSeek V4's packed 4-bit experts: turned into plain numbers as they are loaded.

    FP8 (e4m3)   [rows, columns], beside it a scale for each block of `weight_block_size` (128 x 128)
    FP4 (e2m1)   two numbers a byte, the first in the low half: int8 [rows, columns / 2], a scale for each 32 numbers of a row

Scales lie beside `X.weight` as `X.scale` (DeepSeek V4: e8m0, powers of two) or as `X.weight_scale_inv` (V3 and Hugging Face's own
FP8 models: float32). Where scales are powers of two, bfloat16 holds the products exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvshare.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from kvshare.checkpoints.gguf_blocks import PackedBlocks
    from kvshare.checkpoints.safetensors_dir import SafetensorsDirectory
    from kvshare.checkpoints.tokenizer import Tokenizer

_FP4_GROUP = 32  # numbers of a row that share one scale
_FP4_DTYPES = ("I8", "U8")
_SCALE_NAMES = (".scale", ".weight_scale_inv")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits; the fourth is the sign


def open_block_scaled(checkpoint: SafetensorsDirectory, quantization: Mapping[str, Any]) -> BlockScaledDirectory:
    """The reader for `quant_method` "fp8". Raises `CheckpointError` for scales that do not fit their weights, before any data is read."""
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise CheckpointError(
            f"{checkpoint.origin}: weight_block_size is {block!r}: FP8 weights load with a scale for each block, such as [128, 128]"
        )
    return BlockScaledDirectory(checkpoint, (block[0], block[1]))


class BlockScaledDirectory:
    """A directory of safetensors whose quantized tensors appear as plain numbers; their scales do not appear."""

    def __init__(self, directory: SafetensorsDirectory, block: tuple[int, int]):
        self._directory, self.block = directory, block
        names = directory.names()
        self._scale_of: dict[str, str] = {}
        for ending in _SCALE_NAMES:
            self._scale_of |= {
                weight: name for name in names if name.endswith(ending) and (weight := name.removesuffix(ending) + ".weight") in names
            }
        self._names = names - set(self._scale_of.values())
        self._check_scales()

    @property
    def origin(self) -> str:
        return self._directory.origin

    @property
    def files(self) -> tuple[Path, ...]:
        return self._directory.files

    @property
    def config(self) -> dict[str, Any]:
        return self._directory.config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._directory.generation_config

    @property
    def skipped(self) -> tuple[str, ...]:
        return self._directory.skipped

    def names(self) -> frozenset[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._directory.shape(name)
        return (*shape[:-1], 2 * shape[-1]) if self._is_fp4(name) else shape

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._scale_of:
            return self._directory.get(name, dtype)
        values, scale = self._directory.get(name), self._directory.get(self._scale_of[name])
        return (dequantize_fp4(values, scale) if self._is_fp4(name) else dequantize_fp8(values, scale, self.block)).to(dtype)

    def packed(self, name: str) -> PackedBlocks | None:
        return self._directory.packed(name)

    def tokenizer(self) -> Tokenizer:
        return self._directory.tokenizer()

    def _is_fp4(self, name: str) -> bool:
        return name in self._scale_of and self._directory.dtype(name) in _FP4_DTYPES

    def _check_scales(self) -> None:
        for name in self._names:
            dtype = self._directory.dtype(name)
            if dtype.startswith("F8") and name not in self._scale_of:
                raise CheckpointError(f"{self.origin}: {name} is {dtype} and has no scale beside it ({' or '.join(_SCALE_NAMES)})")
        for name, scale in self._scale_of.items():
            shape, found, dtype = self.shape(name), self._directory.shape(scale), self._directory.dtype(name)
            if dtype != "F8_E4M3" and dtype not in _FP4_DTYPES:
                raise CheckpointError(f"{self.origin}: {name} has a scale, but is {dtype}: what loads is F8_E4M3, and FP4 packed in I8")
            block = (1, _FP4_GROUP) if self._is_fp4(name) else self.block
            expected = tuple(-(-size // step) for size, step in zip(shape, block, strict=True)) if len(shape) == 2 else None
            if found != expected:
                raise CheckpointError(
                    f"{self.origin}: {scale} is {list(found)}; blocks of {block[0]} x {block[1]} of {name} {list(shape)} need {expected}"
                )


def dequantize_fp8(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Float32 [rows, columns] from e4m3 values [rows, columns] and a scale for each block [row blocks, column blocks]."""
    rows, columns = values.shape
    spread = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return values.float().mul_(spread)


def dequantize_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Float32 [rows, columns] from pairs of e2m1 [rows, columns / 2] and scales [rows, columns / 32]."""
    import torch

    codes = torch.tensor([sign * value for sign in (1, -1) for value in _E2M1])
    pairs = torch.stack([codes.repeat(16), codes.repeat_interleave(16)], dim=1)  # [256, 2]: low half, high half of a byte
    values = pairs.index_select(0, packed.view(torch.uint8).flatten().int()).view(len(packed), -1, _FP4_GROUP)
    return values.mul_(scale.float()[..., None]).flatten(1)

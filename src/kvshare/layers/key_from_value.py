"""Keys that need not be stored because they follow from the values: K = RoPE(V * w), with w the weight of the key norm.

Gemma 4's full layers without a value projection compute raw = W x once, V = raw / rms(raw), K = RoPE(raw / rms(raw) * w). So the cache can
hold V alone, or V and the part of K that the rotation moves: all else of K is V times w. In float32 the rebuilt keys are the very same
numbers. In bfloat16 V was rounded before it is multiplied: a rebuilt number is at most two units in the last place away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kvshare.layers.norm import RMSNorm
from kvshare.layers.rotary import Frequencies, Rotation

_FIRST_TABLE = 4096  # positions; later ones are twice as long


class KeyRotations:
    """Cosines and sines for runs of positions, kept while the layers of one step ask for the same run."""

    def __init__(self, frequencies: Frequencies):
        self.moving = int(frequencies.inverse.count_nonzero())  # pairs that the rotation moves at all; they come first
        self._frequencies = Frequencies(frequencies.inverse[: self.moving], frequencies.factor)
        self._last: tuple[tuple[object, ...], Rotation] | None = None
        self._tables: list[tuple[Tensor, Tensor]] = []  # each longer than the one before; what runs again may hold an earlier one's address

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:  # ascending positions [rows]
        key = (int(positions[0]), len(positions), dtype)
        if self._last is None or self._last[0] != key:
            self._last = key, self._frequencies.at(positions, dtype)
        return self._last[1]

    def table(self, count: int) -> tuple[Tensor, Tensor]:  # -> 2 x bfloat16 [at least `count` positions, moving]
        """Cosines and sines of all positions from 0 on, for kernels. Shared by all layers; grows."""
        if not self._tables or len(self._tables[-1][0]) < count:
            size = _FIRST_TABLE
            while size < count:
                size *= 2
            rotation = self._frequencies.at(torch.arange(size), torch.bfloat16)
            self._tables.append((rotation.cos[:, 0].contiguous(), rotation.sin[:, 0].contiguous()))
        return self._tables[-1]


class KeyFromValue(NamedTuple):
    """How an owner's keys are made from what it stores."""

    norm: RMSNorm  # of the keys
    rotations: KeyRotations

    @property
    def weight(self) -> Tensor:  # [width]
        assert self.norm.weight is not None
        return self.norm.weight

    def __call__(self, rows: Mapping[str, Tensor], positions: Tensor) -> Tensor:  # -> [rows, kv_heads, head_dim]
        """A `KeyRebuild`: `rebuilt_keys`."""
        return rebuilt_keys(rows, positions, self.weight, self.rotations)


def rotated_part(k: Tensor, moving: int) -> Tensor:  # [rows, heads, width] -> [rows, heads, 2 * moving]
    """The numbers of rotated keys that the rotation moved: the first `moving` of each half."""
    half = k.shape[-1] // 2
    return torch.cat([k[..., :moving], k[..., half : half + moving]], dim=-1)


def rebuilt_keys(
    rows: Mapping[str, Tensor], positions: Tensor, weight: Tensor, rotations: KeyRotations
) -> Tensor:  # -> [rows, heads, width]
    """Keys from the rows of "v" ([rows, heads, width]) and, where it is stored, "k_rotated" ([rows, heads, 2 * moving])."""
    values, moving = rows["v"], rotations.moving
    keys = (values * weight).to(values.dtype)  # torch multiplies 16-bit numbers in float32 and rounds once
    if not len(keys):
        return keys
    half = keys.shape[-1] // 2
    moved = rows.get("k_rotated")
    if moved is None:
        moved = rotations.at(positions, keys.dtype).half_split(rotated_part(keys, moving))
    keys[..., :moving], keys[..., half : half + moving] = moved[..., :moving], moved[..., moving:]
    return keys

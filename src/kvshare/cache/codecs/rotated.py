"""rot4, rot3 and rot2: rotate, then store each number as the nearest of 16, 8 or 4 levels that are optimal for the normal distribution.
rot8 and rot9: rotate, then evenly spaced levels.

A head of a key or value has a few numbers far larger than the rest, and one scale for all of them wastes most levels. A rotation that mixes
every number into every other leaves numbers that are nearly independent and normal whatever the head was (QuaRot, Ashkboos and
others 2024, rotates to quantize; TurboQuant, Zandieh and others 2025, rounds to the optimal levels), so one table of levels (Lloyd 1957,
Max 1960) serves all models, layers and heads without calibration.

The bytes of a head, heads behind one another:

    codes [ceil(width * bits / 8)]   number i in the bits `bits * i ...` of the little-endian number that the bytes spell
    scale [2]                        float16, little-endian, at any address

    stored = scale * levels[codes]     head = R^T stored

R is orthonormal: random signs (drawn once for each width from Python's generator, whose sequence is fixed), then a Walsh-Hadamard transform
over the largest power of two in the width, and over what is left of it (3 of 96) a discrete cosine transform. Because R keeps inner
products, a kernel can rotate the query once instead of every key. The scale is not the norm but what makes `stored` the closest point to
the rotated head on its line, so that the error is never longer than the head. Heads beyond 65,504 times the levels saturate; one with a
number that is not one is not-a-number when it is read.

With 8 bits evenly spaced levels lose little more than optimal ones: rot8 stores what int8 would store of the rotated head, byte for byte.
rot9 has codes of -255 ... 255, twice as fine, cut into what products of bytes can take and one bit more:

    high [width]            int8: the code halved and rounded down, -128 ... 127
    low [ceil(width / 8)]   bit i of the little-endian number that the bytes spell is 1 where code i is odd: code = 2 high + low
    scale [2]               float16, little-endian, at any address; stored = scale * code
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

import torch
from torch import Tensor

from kvshare.cache.codecs.deepseek import hadamard
from kvshare.cache.codecs.packing import half_at_least, packed, scalars, spelled, unpacked
from kvshare.cache.codecs.scaled import ScaledCodec

_POSITIVE_LEVELS = {
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
"""By bits: the upper half of the levels of least mean squared error for a normal variable of variance 1 (Max 1960, table I)."""


class RotatedCodec:
    """The codec "rot4", "rot3" or "rot2": by mean squares, 0.95, 3.5 or 11.8 % of a head is lost."""

    def __init__(self, bits: int):
        self.bits = bits
        positive = torch.tensor(_POSITIVE_LEVELS[bits])
        self.levels = torch.cat([-positive.flip(0), positive])  # [2^bits], ascending
        self.borders = (self.levels[1:] + self.levels[:-1]) / 2

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        largest = rows.float().abs().amax(-1, keepdim=True)
        unit = torch.where(largest == 0, 1, largest)  # squares of what is divided by it neither overflow nor vanish
        rotated = _rotate(rows.float() / unit)  # [rows, heads, width]
        spread = rotated.square().mean(-1, keepdim=True).sqrt()
        codes = torch.bucketize(rotated / torch.where(spread == 0, 1, spread), self.borders.to(rows.device))
        points = self.levels.to(rows.device)[codes]
        scale = (rotated * points).sum(-1, keepdim=True) / points.square().sum(-1, keepdim=True) * unit
        scale = scale.clamp(max=torch.finfo(torch.float16).max).half()
        return torch.cat([packed(codes, self.bits), spelled(scale)], dim=-1).flatten(1)

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> float32 [rows, heads, width]
        codes, scale = encoded.unflatten(-1, (heads, -1)).split([-(-width * self.bits // 8), 2], dim=-1)
        points = self.levels.to(encoded.device)[unpacked(codes, self.bits, width).int()]
        return _rotate_back(points.mul_(scalars(scale)))


class RotatedScaledCodec:
    """The codec "rot8": int8 of rotated heads, whose largest number is only some three times the typical one."""

    def __init__(self) -> None:
        self.scaled = ScaledCodec("int8")

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        return self.scaled.encode(_rotate(rows.float()))

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> float32 [rows, heads, width]
        return _rotate_back(self.scaled.decode(encoded, heads, width))


class RotatedNineCodec:
    """The codec "rot9". A rotated number is at most half a scale from what was given; the scale is the largest one over 255."""

    largest = 255

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        rotated = _rotate(rows.float())
        scale = half_at_least(rotated.abs().amax(-1, keepdim=True) / self.largest)  # [rows, heads, 1]
        divisor = torch.where(scale == 0, 1, scale.float())
        codes = (rotated / divisor).round_().clamp_(-self.largest, self.largest).to(torch.int16)
        high = (codes >> 1).to(torch.int8).view(torch.uint8)
        return torch.cat([high, packed(codes & 1, 1), spelled(scale)], dim=-1).flatten(1)

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> float32 [rows, heads, width]
        high, low, scale = encoded.unflatten(-1, (heads, -1)).split([width, -(-width // 8), 2], dim=-1)
        codes = 2 * high.view(torch.int8).float() + unpacked(low, 1, width)
        return _rotate_back(codes.mul_(scalars(scale)))


class RotatedRawCodec:
    """bfloat16 numbers of rotated heads: the newest rows beside encoded ones. Rounded once more than rows that are stored as they are."""

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        return _rotate(rows.float()).bfloat16().flatten(1).view(torch.uint8)

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> float32 [rows, heads, width]
        return _rotate_back(encoded.view(torch.bfloat16).unflatten(-1, (heads, width)).float())


def _rotate(x: Tensor) -> Tensor:  # float32 [..., width]
    signs, cosines = rotation(x.shape[-1])
    mixed = hadamard((x * signs.to(x.device)).unflatten(-1, (cosines.shape[0], -1)))
    return (cosines.to(x.device) @ mixed).flatten(-2) if len(cosines) > 1 else mixed.flatten(-2)


def _rotate_back(x: Tensor) -> Tensor:  # float32 [..., width]
    signs, cosines = rotation(x.shape[-1])
    mixed = x.unflatten(-1, (cosines.shape[0], -1))
    mixed = cosines.T.to(x.device) @ mixed if len(cosines) > 1 else mixed
    return hadamard(mixed).flatten(-2) * signs.to(x.device)


@lru_cache
def rotation(width: int) -> tuple[Tensor, Tensor]:
    """Signs [width], and the orthonormal discrete cosine transform [odd, odd] of the odd factor of `width`."""
    draw = random.Random(width).getrandbits(width)
    signs = torch.tensor([1.0 - 2.0 * (draw >> i & 1) for i in range(width)])
    odd = width // (width & -width)
    frequency, place = torch.arange(odd, dtype=torch.float64)[:, None], torch.arange(odd, dtype=torch.float64)
    cosines = torch.cos(math.pi / odd * (place + 0.5) * frequency) * math.sqrt(2 / odd)
    cosines[0] /= math.sqrt(2)
    return signs, cosines.float()

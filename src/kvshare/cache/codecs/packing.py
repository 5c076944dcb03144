"""What the integer codecs have in common: codes of 1 to 4 bits in bytes, and 16-bit scalars that bound what they stand for."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST_HALF = 65504.0


def packed(codes: Tensor, bits: int) -> Tensor:  # integers [..., width] in [0, 2^bits) -> uint8 [..., ceil(width * bits / 8)]
    """Code i takes the bits `bits * i` and up of the little-endian number that the bytes spell."""
    width = codes.shape[-1]
    together, size = _unit(bits)
    units = F.pad(codes.int(), (0, -width % together)).unflatten(-1, (-1, together))
    words = (units << bits * torch.arange(together, dtype=torch.int32, device=codes.device)).sum(-1, dtype=torch.int32)
    spelled = words[..., None] >> 8 * torch.arange(size, dtype=torch.int32, device=codes.device) & 255
    return spelled.to(torch.uint8).flatten(-2)[..., : -(-width * bits // 8)]


def unpacked(stored: Tensor, bits: int, width: int) -> Tensor:  # uint8 [..., ceil(width * bits / 8)] -> integers [..., width]
    """The codes that `packed` stored: uint8, or int32 where a code may straddle two bytes."""
    together, size = _unit(bits)
    if size == 1:
        words = stored
    else:
        units = F.pad(stored, (0, -stored.shape[-1] % size)).unflatten(-1, (-1, size)).int()
        words = (units << 8 * torch.arange(size, dtype=torch.int32, device=stored.device)).sum(-1, dtype=torch.int32)
    shifts = bits * torch.arange(together, dtype=words.dtype, device=stored.device)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)[..., :width]


def _unit(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and how many bytes."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def half_at_least(x: Tensor) -> Tensor:  # float32 -> float16
    """The least float16 that is not below x; the largest finite one for what is beyond all of them. Not-a-number stays that."""
    bounded = x.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    near = bounded.half()
    return torch.where(near.float() < bounded, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def half_at_most(x: Tensor) -> Tensor:  # float32 -> float16
    """The greatest float16 that is not above x."""
    return -half_at_least(-x)


def spelled(scalars: Tensor) -> Tensor:  # float16 [..., n] -> uint8 [..., 2 * n]
    return scalars.contiguous().view(torch.uint8)


def scalars(stored: Tensor) -> Tensor:  # uint8 [..., 2 * n] -> float32 [..., n]
    """16-bit floats from bytes that may lie at an odd address."""
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float16).float()

"""int4: four bits a number, and a 16-bit scale and minimum for every 32 numbers of a head.

The bytes of a head of `width` numbers in g = ceil(width / 32) groups, heads behind one another:

    codes [ceil(width / 2)]   number 2i in the low half of byte i, number 2i + 1 in the high half; the last half is 0 where width is odd
    scales [2 g]              float16, little-endian, at any address
    minima [2 g]              float16; number i is code i times scale plus minimum of group i // 32

A last group may be short; groups never cross heads or rows. The minimum is rounded down and the scale up, so that every number lies
between code 0 and code 15 even where float16 is coarser than the group's range. Numbers beyond +-65,504 saturate. A number that is not one
makes its whole group not-a-number when it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvshare.cache.codecs.packing import half_at_least, half_at_most, packed, scalars, spelled, unpacked
from kvshare.layout.rows import INT4_GROUP

_LARGEST_CODE = 15


class GroupedCodec:
    """The codec "int4". A number is at most half its group's scale from what was given, and a scale is a fifteenth of the group's range."""

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        width = rows.shape[-1]
        last = rows[..., -1:].float().expand(*rows.shape[:-1], -width % INT4_GROUP)  # fills a short group without widening its range
        groups = torch.cat([rows.float(), last], dim=-1).unflatten(-1, (-1, INT4_GROUP))
        low, high = groups.aminmax(dim=-1)  # [rows, heads, groups]
        minimum = half_at_most(low)
        scale = half_at_least((high - minimum.float()) / _LARGEST_CODE)
        divisor = torch.where(scale == 0, 1, scale.float())
        codes = ((groups - minimum.float()[..., None]) / divisor[..., None]).round_().clamp_(0, _LARGEST_CODE)
        codes = codes.nan_to_num_().flatten(-2)[..., :width]
        return torch.cat([packed(codes, 4), spelled(scale), spelled(minimum)], dim=-1).flatten(1)

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> float32 [rows, heads, width]
        count = -(-width // INT4_GROUP)
        codes, scale, minimum = encoded.unflatten(-1, (heads, -1)).split([-(-width // 2), 2 * count, 2 * count], dim=-1)
        numbers = unpacked(codes, 4, width).float()
        groups = F.pad(numbers, (0, -width % INT4_GROUP)).unflatten(-1, (count, INT4_GROUP))
        groups = groups.mul_(scalars(scale)[..., None]).add_(scalars(minimum)[..., None])
        return groups.flatten(-2)[..., :width]

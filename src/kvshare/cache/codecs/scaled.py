"""int8 and fp8: eight bits a number, and one 16-bit scale for each head of each row.

The bytes of a head, heads behind one another:

    codes [width]       int8 in -127 ... 127, or float8 e4m3 (1 sign, 4 exponent, 3 mantissa bits; no infinities, largest 448)
    scale [2]           float16, little-endian, at any address; number i is code i times scale

The scale is the least float16 that keeps the head's largest number inside the codes: it is rounded up, so nothing saturates where float16
is coarse (numbers below 1e-3 get subnormal scales) until the scale itself does, at 8.3 million (int8) or 29 million (fp8). A head of zeros
has scale 0. A number that is not one makes its whole head not-a-number when it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvshare.cache.codecs.packing import half_at_least, scalars, spelled

_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


class ScaledCodec:
    """The codec "int8" or "fp8". An int8 number is at most half a scale from what was given, an fp8 one 1/16 of itself."""

    def __init__(self, name: str):
        self.codes, self.largest = _CODES[name], _LARGEST[name]

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        numbers = rows.float()
        scale = half_at_least(numbers.abs().amax(-1, keepdim=True) / self.largest)  # [rows, heads, 1]
        divisor = torch.where(scale == 0, 1, scale.float())
        scaled = (numbers / divisor).clamp(-self.largest, self.largest)
        codes = (scaled.round() if self.codes == torch.int8 else scaled).to(self.codes)
        return torch.cat([codes.view(torch.uint8), spelled(scale)], dim=-1).flatten(1)

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> float32 [rows, heads, width]
        vectors = encoded.unflatten(-1, (heads, -1))
        return vectors[..., :width].view(self.codes).float().mul_(scalars(vectors[..., width:]))

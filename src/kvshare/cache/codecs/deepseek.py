"""DeepSeek's own rows: 8 or 4 bit floats with a power-of-two scale for each block, and 16 bits for the numbers that carry the position.

A vector is spelled: codes of the plain numbers | the exact numbers in bfloat16 | scales | padding. V4's key-value vector takes
448 + 128 + 7 + 1 = 584 bytes, its indexer key 64 + 4 = 68. The arithmetic is that of the published inference code: scales are
rounded up to a power of two, so that the largest number of a block never saturates, and codes to nearest, ties to even.
What was rounded once is spelled without further loss.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kvshare.layout.rows import BlockRow

_E4M3_LARGEST, _E2M1_LARGEST = 448.0, 6.0
_SMALLEST_AMAX = {8: 1e-4, 4: 6 * 2.0**-126}  # by bits: what the published code takes for the largest number of a block of zeros
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127  # of an e8m0 scale


class BlockFloatCodec:
    """The codec of one stream's native form."""

    def __init__(self, row: BlockRow):
        self.row = row

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        form, width = self.row, rows.shape[-1]
        plain = rows[..., : width - form.exact].float()
        padding = -plain.shape[-1] % form.group  # a last block may be short; zeros do not change its scale
        blocks = F.pad(plain, (0, padding)).unflatten(-1, (-1, form.group))
        largest = _E4M3_LARGEST if form.bits == 8 else _E2M1_LARGEST
        exponents = power_above(blocks.abs().amax(-1).clamp_min(_SMALLEST_AMAX[form.bits]) / largest)  # [rows, heads, blocks]
        scaled = torch.ldexp(blocks, -exponents[..., None]).flatten(-2)[..., : plain.shape[-1]]
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8) if form.bits == 8 else _packed_e2m1(scaled)
        exact = rows[..., width - form.exact :].bfloat16().contiguous().view(torch.uint8)
        parts = [codes, exact, _spelled_scales(exponents, form.scale_bytes)]
        used = sum(part.shape[-1] for part in parts)
        parts.append(codes.new_zeros(*codes.shape[:-1], form.vector_bytes(width) - used))
        return torch.cat(parts, dim=-1).flatten(1)

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> bfloat16 [rows, heads, width]
        form, plain = self.row, width - self.row.exact
        blocks = -(-plain // form.group)
        vectors = encoded.unflatten(-1, (heads, -1))
        sizes = [plain * form.bits // 8, 2 * form.exact, blocks * form.scale_bytes]
        codes, exact, scales, _ = vectors.split([*sizes, vectors.shape[-1] - sum(sizes)], dim=-1)
        values = codes.view(torch.float8_e4m3fn).float() if form.bits == 8 else _unpacked_e2m1(codes)
        shape = (*vectors.shape[:-1], blocks)
        scale = (scales.float() - _EXPONENT_BIAS).exp2() if form.scale_bytes == 1 else _as(scales, torch.float32).view(shape)
        values *= scale.repeat_interleave(form.group, -1)[..., :plain]
        return torch.cat([values.bfloat16(), _as(exact, torch.bfloat16).view(*vectors.shape[:-1], form.exact)], dim=-1)

    def rounded(self, rows: Tensor) -> Tensor:  # [rows, heads, width]
        """The rows as they would be read again."""
        return self.decode(self.encode(rows), *rows.shape[1:]).to(rows.dtype)


def power_above(x: Tensor) -> Tensor:
    """The least integer e with 2^e >= x, for positive x; exact, unlike a logarithm."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    return exponent - (mantissa == 0.5).int()


def hadamard(x: Tensor) -> Tensor:  # [..., width], a power of two
    """The normalised Walsh-Hadamard transform: it spreads outliers over all numbers, keeps inner products, and is its own inverse."""
    width = x.shape[-1]
    mixed, half = x.to(torch.promote_types(x.dtype, torch.float32)), 1
    while half < width:
        first, second = mixed.unflatten(-1, (-1, 2, half)).unbind(-2)
        mixed = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return (mixed * width**-0.5).to(x.dtype)


def _spelled_scales(exponents: Tensor, scale_bytes: int) -> Tensor:  # int [..., blocks] -> uint8 [..., blocks * scale_bytes]
    if scale_bytes == 1:
        return (exponents + _EXPONENT_BIAS).to(torch.uint8)
    return exponents.float().exp2().view(torch.uint8)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:  # uint8 -> [numbers]
    """Bytes read as numbers of another type, for which they must lie together."""
    return x.reshape(-1).view(dtype)


def _packed_e2m1(x: Tensor) -> Tensor:  # [..., width] in [-6, 6] -> uint8 [..., width / 2], the first of a pair in the low half
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(_E2M1)], device=x.device)
    odd = middles[1::2]  # ties go to the even code: up from an odd one, else down
    odd.copy_(torch.nextafter(odd, torch.zeros_like(odd)))
    codes = torch.bucketize(x.abs(), middles) + 8 * torch.signbit(x)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low + 16 * high).to(torch.uint8)


def _unpacked_e2m1(packed: Tensor) -> Tensor:  # uint8 [..., width / 2] -> float32 [..., width]
    values = torch.tensor([sign * value for sign in (1, -1) for value in _E2M1], device=packed.device)
    return values[torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()]

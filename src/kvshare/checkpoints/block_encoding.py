"""Quantizing weights into the same blocks that GGUF files use, so that one set of kernels serves both.

int8 is Q8_0: a scale for 32 numbers, 8.5 bits each. int4 is Q4_K: scale and minimum for 32 numbers, themselves in 6 bits with two 16-bit
floats for 256, together 4.5 bits, as many as Q4_0 without a minimum; rows that are no multiple of 256 take Q4_1 (16-bit scale and minimum,
5 bits). Scales are searched: what rounds least is not the scale that just holds the largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BLOCK_TYPES, BlockType
from kvshare.kernels import native

GROUP = 32
PRECISIONS: Mapping[str, tuple[str, ...]] = {"int8": ("Q8_0",), "int4": ("Q4_K", "Q4_1")}
"""By the name that users give: block types, of which the first that divides a row is taken."""

_NUMBERS_AT_ONCE = 1 << 20  # bounds the float32 copies
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the range that is fitted first
_REFITS = 2


def block_type(precision: str, width: int) -> BlockType:
    """What rows of `width` numbers become in `precision`. `width` must be a multiple of `GROUP`."""
    forms = {form.name: form for form in BLOCK_TYPES.values()}
    return next(forms[name] for name in PRECISIONS[precision] if width % forms[name].block_size == 0)


def encode_blocks(weight: Tensor, form: BlockType) -> PackedBlocks:  # [..., width], any floating-point type
    """All of `weight` in blocks of `form`."""
    return PackedBlocks(form, tuple(weight.shape), torch.cat(list(encoded_rows(weight, form))))


def encoded_rows(weight: Tensor, form: BlockType) -> Iterator[Tensor]:  # [..., width] -> uint8 [some rows, row bytes]
    """The rows of `weight`, those of a stack one below the other, in blocks of `form`, some at a time."""
    weight = weight.flatten(0, -2)
    encode = _encode_natively if native.available() else encode_in_torch
    step = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        yield encode(weight[start : start + step], form)


def encode_in_torch(weight: Tensor, form: BlockType) -> Tensor:  # [rows, width] -> uint8 [rows, row bytes]
    """The native encoder's twin. Sums in another order choose another code here and there: squared errors differ by less than 0.1 %."""
    groups = weight.float().reshape(-1, form.block_size // GROUP, GROUP)
    return _ENCODERS[form.name](groups).view(len(weight), -1)


def _encode_natively(weight: Tensor, form: BlockType) -> Tensor:
    kernels = native.module()
    weight = (weight if weight.dtype == torch.bfloat16 else weight.float()).contiguous()
    rows, width = weight.shape
    out = torch.empty(rows, width // form.block_size * form.block_bytes, dtype=torch.uint8)
    kernels.encode(kernels.BlockType[form.name], weight.data_ptr(), weight.dtype == torch.bfloat16, rows, width, out.data_ptr())
    return out


def _q8_0(groups: Tensor) -> Tensor:  # float32 [blocks, 1, 32] -> uint8 [blocks, 34]
    groups = groups.squeeze(1)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
    codes = _divided(groups, scale.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=-1)


def _q4_1(groups: Tensor) -> Tensor:  # float32 [blocks, 1, 32] -> uint8 [blocks, 20]
    groups = groups.squeeze(1)
    scale, minimum = (each.half() for each in _fitted(groups, least=float("-inf")))
    codes = _codes(groups, scale.float(), minimum.float())
    return torch.cat([scale.view(torch.uint8), (-minimum).view(torch.uint8), _halves(codes)], dim=-1)


def _q4_k(groups: Tensor) -> Tensor:  # float32 [blocks, 8, 32] -> uint8 [blocks, 144]
    scale, minimum = _fitted(groups, least=0.0)  # [blocks, 8, 1]
    whole = [(each.amax(1, keepdim=True) / 63).half().float() for each in (scale, minimum)]  # [blocks, 1, 1]
    steps = [_divided(each, unit).round().clamp(0, 63) for each, unit in zip((scale, minimum), whole, strict=True)]  # 6 bits [blocks, 8, 1]
    codes = _codes(groups, whole[0] * steps[0], whole[1] * steps[1])
    whole, codes = _refitted(groups, whole, steps, codes)
    scales, minima = (each.squeeze(-1).to(torch.uint8) for each in steps)  # [blocks, 8]
    packed = torch.cat(
        [
            scales[:, :4] | (scales[:, 4:] >> 4) << 6,
            minima[:, :4] | (minima[:, 4:] >> 4) << 6,
            scales[:, 4:] & 0x0F | (minima[:, 4:] & 0x0F) << 4,
        ],
        dim=-1,
    )
    units = [each.flatten(1).half().view(torch.uint8) for each in whole]
    low, high = codes.to(torch.uint8).view(-1, 4, 2, GROUP).unbind(2)  # groups lie in pairs, one in the low and one in the high halves
    return torch.cat([*units, packed, (low | high << 4).flatten(1)], dim=-1)


def _fitted(groups: Tensor, least: float) -> tuple[Tensor, Tensor]:  # float32 [..., 32] -> 2 x [..., 1]
    """Scale and minimum (>= `least`) such that scale * code - minimum is near the numbers, code from 0 to 15, in the least squares.

    From ranges of several widths, codes and the best scale and minimum for these codes are found in turn.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if least == 0:
        low = low.clamp_max(0)
    mean = groups.mean(-1, keepdim=True)
    best: tuple[Tensor, Tensor] | None = None
    best_error = torch.full_like(low, float("inf"))
    for shrink in _SHRINKS:
        middle = (low + high) / 2 if least != 0 else torch.zeros_like(low)
        scale, minimum = (high - low) * (shrink / 15), -(middle + (low - middle) * shrink)
        for _ in range(_REFITS):
            scale, minimum = _least_squares(groups, mean, _codes(groups, scale, minimum), least)
        error = (_codes(groups, scale, minimum) * scale - minimum - groups).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = (scale, minimum) if best is None else (torch.where(better, scale, best[0]), torch.where(better, minimum, best[1]))
    assert best is not None
    return best


def _least_squares(groups: Tensor, mean: Tensor, codes: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """The best scale (not negative) and minimum for codes [..., 32]."""
    centre = codes.mean(-1, keepdim=True)
    spread = (codes - centre).square().sum(-1, keepdim=True)
    scale = _divided(((codes - centre) * (groups - mean)).sum(-1, keepdim=True), spread).clamp_min(0)
    minimum = scale * centre - mean
    through_zero = _divided((codes * groups).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)).clamp_min(0)
    below = minimum < least
    return torch.where(below, through_zero, scale), torch.where(below, 0, minimum)


def _refitted(groups: Tensor, whole: list[Tensor], steps: list[Tensor], codes: Tensor) -> tuple[list[Tensor], Tensor]:
    """The two 16-bit units of a block [blocks, 1, 1] fitted to the codes of all its groups; taken where the error becomes smaller."""

    def error(units: list[Tensor], codes: Tensor) -> Tensor:
        return (units[0] * steps[0] * codes - units[1] * steps[1] - groups).square().sum((1, 2), keepdim=True)

    up, down = steps[0] * codes, -steps[1].expand_as(codes)
    a, b, c, s, t = (x.sum((1, 2), keepdim=True) for x in (up * up, up * down, down * down, up * groups, down * groups))
    determinant = a * c - b * b
    solvable = determinant > 1e-6 * a * c
    found = [_divided(s * c - t * b, determinant), _divided(t * a - s * b, determinant)]
    new = [torch.where(solvable, x, old).clamp_min(0).half().float() for x, old in zip(found, whole, strict=True)]
    new_codes = _codes(groups, new[0] * steps[0], new[1] * steps[1])
    better = error(new, new_codes) < error(whole, codes)
    return [torch.where(better, x, old) for x, old in zip(new, whole, strict=True)], torch.where(better, new_codes, codes)


def _codes(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return _divided(groups + minimum, scale).round().clamp(0, 15)


def _divided(numbers: Tensor, by: Tensor) -> Tensor:
    """0 where the divisor is."""
    return torch.where(by != 0, numbers / by, 0)


def _halves(codes: Tensor) -> Tensor:  # [blocks, 32] -> uint8 [blocks, 16]
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


_ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = {"Q8_0": _q8_0, "Q4_1": _q4_1, "Q4_K": _q4_k}

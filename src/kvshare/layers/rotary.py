"""Rotary position embeddings (Su et al. 2021) and the ways in which released models bend their frequencies.

Frequencies are a function of the config, computed once in float32 as transformers does; a step rotates by its positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvshare.errors import ConfigError
from kvshare.kernels import edges, small_ops
from kvshare.layers.norm import RMSNorm


class Frequencies(NamedTuple):
    """Angles a token of each rotated pair, and the factor on cosine and sine (YaRN's attention factor)."""

    inverse: Tensor  # [pairs], radians a token
    factor: float = 1.0

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:  # positions [tokens]
        if edges.takes(positions, dtype):
            return Rotation(*edges.turns(positions, self.inverse, self.factor, dtype))
        angles = positions[:, None].float() * self.inverse.to(positions.device)  # [tokens, pairs]
        return Rotation((angles.cos() * self.factor).to(dtype)[:, None], (angles.sin() * self.factor).to(dtype)[:, None])


class Rotation(NamedTuple):
    """Cosines and sines of a step's positions."""

    cos: Tensor  # [tokens, 1, pairs]
    sin: Tensor  # [tokens, 1, pairs]

    def half_split(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:  # [tokens, heads, width]
        """Rotate pairs (i, i + pairs) of the first 2 * pairs numbers of each head, which is normed first if there is a `norm`."""
        if self.cos.dtype == x.dtype and self._is_taken(x):
            return small_ops.rotate(x, self.cos, self.sin, interleaved=False, norm=None if norm is None else norm.spelled())
        if norm is not None:
            x = norm(x)
        pairs = self.cos.shape[-1]
        first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
        parts = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        if x.shape[-1] > 2 * pairs:
            parts.append(x[..., 2 * pairs :])
        return torch.cat(parts, dim=-1)

    def interleaved(self, x: Tensor) -> Tensor:  # [tokens, heads, width]
        """Rotate pairs (2i, 2i + 1) of the last 2 * pairs numbers of each head (DeepSeek); the others pass."""
        if self.cos.dtype in (x.dtype, torch.float32) and self._is_taken(x):
            return small_ops.rotate(x, self.cos, self.sin, interleaved=True)
        rotated = 2 * self.cos.shape[-1]
        first, second = x[..., -rotated:].unflatten(-1, (-1, 2)).to(torch.promote_types(x.dtype, self.cos.dtype)).unbind(-1)
        turned = torch.stack([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1).flatten(-2).to(x.dtype)
        return turned if rotated == x.shape[-1] else torch.cat([x[..., :-rotated], turned], dim=-1)

    def _is_taken(self, x: Tensor) -> bool:
        cos, sin = self.cos, self.sin
        return small_ops.takes(x) and x.dim() == 3 and x.shape[0] == cos.shape[0] and cos.is_contiguous() and sin.is_contiguous()

    def at_rows(self, rows: Tensor) -> Rotation:
        """The rotation of some of the step's tokens."""
        return Rotation(self.cos[rows], self.sin[rows])


def frequencies(rope: Mapping[str, Any], width: int) -> Frequencies:
    """The frequencies that a config's rope parameters (`rope_type`, `rope_theta`, `factor`, ...) give to heads of `width` numbers.

    Types: default, linear, llama3, yarn (Peng et al. 2023), proportional (Gemma 4: the denominators are those of the whole
    width, and all but the first pairs stand still). `partial_rotary_factor` rotates only a part of each head.
    """
    with torch.device("cpu"):  # also while a model is built on the meta device
        return _frequencies(rope, width)


def _frequencies(rope: Mapping[str, Any], width: int) -> Frequencies:
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", 10_000.0))
    share = float(rope.get("partial_rotary_factor", 1.0))
    if kind == "proportional":
        moving = int(share * width // 2)
        inverse = _powers(theta, width)
        return Frequencies(torch.cat([inverse[:moving], torch.zeros(width // 2 - moving)]) / float(rope.get("factor", 1.0)))
    rotated = int(width * share)
    inverse = _powers(theta, rotated)
    if kind == "default":
        return Frequencies(inverse)
    factor = float(rope["factor"])
    if kind == "linear":
        return Frequencies(inverse / factor)
    if kind == "llama3":
        return Frequencies(_llama3(inverse, rope, factor))
    if kind == "yarn":
        return _yarn(inverse, rope, factor, theta, rotated)
    raise ConfigError("rope_type", f"unknown {kind!r}: known are default, linear, llama3, yarn, proportional")


def _powers(theta: float, width: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


def _llama3(inverse: Tensor, rope: Mapping[str, Any], factor: float) -> Tensor:
    """Llama 3.1: slow pairs are stretched by `factor`, fast ones kept, those between blended."""
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) * inverse / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (blend + (1 - blend) / factor)


def _yarn(inverse: Tensor, rope: Mapping[str, Any], factor: float, theta: float, rotated: int) -> Frequencies:
    """YaRN: pairs that turn often within the original context keep their frequency, slow ones are interpolated, a ramp between."""
    original = float(rope["original_max_position_embeddings"])

    def pair_turning(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(float(rope.get("beta_fast", 32))), pair_turning(float(rope.get("beta_slow", 1)))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = ((torch.arange(rotated // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = rope.get("attention_factor")
    if attention is None:
        both = float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
        attention = yarn_magnitude(factor, both[0]) / yarn_magnitude(factor, both[1]) if all(both) else yarn_magnitude(factor)
    return Frequencies(inverse / factor * ramp + inverse * (1 - ramp), float(attention))


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction for longer contexts: by how much queries and keys grow so that attention stays as sharp as it was."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

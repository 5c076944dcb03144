"""How keys and queries compare channel by channel, read off the weights of their norms: what `cache.codecs.balanced` divides keys by.

After a norm with a weight w, channel c of a head is |w[c]| large on average whatever the text, and after the rotation both channels of a
pair are as large as their root mean square. So no calibration is needed. Families without such norms on keys and queries have no balance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.layers.norm import RMSNorm
from kvshare.layout import CacheLayout

_SMALLEST = 1e-6  # of a head's root mean square: weights below it count as this


def key_balance(layout: CacheLayout, blocks: nn.ModuleList, pairs: Callable[[int], int]) -> dict[int, Tensor]:
    """By owner that stores whole keys behind a norm: the factors [kv_heads, width] bfloat16, powers of two, to divide its keys by.

    `pairs(layer)` is how many pairs of a head (i, i + pairs) the layer rotates. All layers that attend to the owner's keys count, each by
    its queries' norm; those that project queries before they meet another layer's keys are left out.
    """
    factors = {}
    for owner in layout.owners:
        stream = next((stream for stream in layout.layers[owner].streams if stream.name == "k"), None)
        norm = getattr(blocks[owner].attention, "k_norm", None)
        if stream is None or norm is None:
            continue
        attentions: list[Any] = [blocks[layer].attention for layer in (owner, *layout.readers(owner))]
        queries = [a.q_norm for a in attentions if getattr(a, "key_projection", None) is None]
        factors[owner] = balance(norm, queries, pairs(owner)).expand(stream.heads, -1).contiguous()
    return factors


def balance(keys: RMSNorm, queries: Iterable[RMSNorm], pairs: int) -> Tensor:  # -> [width]
    """sqrt(|k| / |q|) as a power of two, 1 in the middle, of keys and queries behind these norms."""
    k = _amplitudes(keys, pairs).sqrt()
    q = torch.stack([_amplitudes(norm, pairs) for norm in queries]).mean(0).sqrt()
    exponents = 0.5 * (k.log2() - q.log2())
    return (exponents - exponents.mean()).round().exp2().bfloat16()


def _amplitudes(norm: RMSNorm, pairs: int) -> Tensor:  # -> [width]
    """Mean squares of the channels behind a norm and a rotation, relative to all of them."""
    assert norm.weight is not None
    squares = (norm.weight.detach().float() + norm.offset).square()
    rotated = squares[: 2 * pairs].view(2, pairs).mean(0)
    squares = torch.cat([rotated, rotated, squares[2 * pairs :]])
    return (squares / squares.mean().clamp_min(torch.finfo(squares.dtype).tiny)).clamp_min(_SMALLEST**2)

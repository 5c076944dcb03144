"""Keys whose channels are divided by fixed factors before they are encoded, which queries make up for.

    q . k = (q * s) . (k / s)

A codec spreads its error evenly over a head's channels, but a score feels an error as much as the query is large there. Where keys and
queries are large in different channels, dividing keys by s = sqrt(|k| / |q|) makes both profiles the same, which is the least error that
scaling can give: (sum |q| |k|)^2 in place of (sum |q|^2)(sum |k|^2). SmoothQuant (Xiao and others 2022) moves outliers from activations to
weights this way, by calibration; here the norms' weights of the model say how large channels are (`kvshare.layers.key_balance`). The
factors are powers of two, so that dividing and multiplying add no error of their own. They take no bytes in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kvshare.cache.codecs import Codec


class BalancedCodec:
    """`codec` spells keys that have been divided by `balance`: [heads, width] bfloat16, exact for powers of two."""

    def __init__(self, codec: Codec, balance: Tensor):
        self.codec, self.balance = codec, balance

    def encode(self, rows: Tensor) -> Tensor:  # [rows, heads, width] -> uint8 [rows, row_bytes]
        return self.codec.encode(rows / self.balance.to(rows.device))

    def decode(self, encoded: Tensor, heads: int, width: int) -> Tensor:  # uint8 [rows, row_bytes] -> float32 [rows, heads, width]
        return self.codec.decode(encoded, heads, width) * self.balance.to(encoded.device)

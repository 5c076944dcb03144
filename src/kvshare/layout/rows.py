"""How many bytes one cached row takes in each precision: the only place that knows.

A *row* is what one layer keeps of one token (or of one block of tokens) in one stream: `heads` vectors of `width` numbers.
Codecs (`kvshare.cache.codecs`) write exactly these bytes; the planner adds them up without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from kvshare.errors import ConfigError

BF16_BITS = 16
SCALE_BYTES = 2  # scales and minima are stored as float16
INT4_GROUP = 32  # numbers that share one scale and one minimum
NEWEST = "+"  # rot4+32: rot4, the newest 32 rows in 16 bits
NATIVE = "native"  # the format that the model's authors serve: each stream says its own (`Stream.native`), else bf16


@dataclass(frozen=True, slots=True)
class Precision:
    """One way of spelling a row: `bits` a number, plus `scales` 16-bit scalars for every `group` numbers (0: a head's whole vector).

    Each query reads the `newest` rows in 16 bits instead, which are kept in a stream of their own (`kvshare.layout.newest`).
    """

    name: str
    bits: int
    scales: int = 0
    group: int = 0
    newest: int = 0

    @property
    def codec(self) -> str:
        """How rows that are not among the newest are spelled: a key of `PRECISIONS`."""
        return self.name.partition(NEWEST)[0]

    def row_bytes(self, heads: int, width: int) -> int:
        """Bytes of one row of `heads` vectors of `width` numbers, scales included."""
        groups = -(-width // self.group) if self.group else 1
        return heads * (-(-width * self.bits // 8) + groups * self.scales * SCALE_BYTES)


@dataclass(frozen=True, slots=True)
class BlockRow:
    """The native form of a vector: floats of `bits` bits with a scale for each `group` of them, its last `exact` numbers in 16 bits."""

    bits: int  # 8: e4m3, 4: e2m1
    group: int
    scale_bytes: int = 1  # 1: a power of two as its exponent (e8m0), 4: float32
    exact: int = 0  # numbers at the end that carry the position's rotation
    align: int = 1  # a vector is padded to a multiple of this many bytes

    def vector_bytes(self, width: int) -> int:
        """Bytes of a vector of `width` numbers."""
        plain = width - self.exact
        used = -(-plain * self.bits // 8) + -(-plain // self.group) * self.scale_bytes + 2 * self.exact
        return -(-used // self.align) * self.align


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        p.name: p
        for p in (
            Precision("fp32", 32),
            Precision("fp16", 16),
            Precision("bf16", 16),
            Precision("fp8", 8, scales=1),
            Precision("int8", 8, scales=1),
            Precision("int4", 4, scales=2, group=INT4_GROUP),
            Precision("rot9", 9, scales=1),
            Precision("rot8", 8, scales=1),
            Precision("rot4", 4, scales=1),
            Precision("rot3", 3, scales=1),
            Precision("rot2", 2, scales=1),
            Precision(NATIVE, 16),
        )
    }
)

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8, "int32": 4})


def precision_named(name: str) -> Precision:
    """The precision called `name`, like `rot4` or `rot4+32`; raises `ConfigError` with the list of those that exist."""
    codec, plus, newest = name.partition(NEWEST)
    form = PRECISIONS.get(codec)
    if form is None or (plus and not (newest.isdecimal() and int(newest))):
        raise ConfigError("kv_dtype", f"unknown precision {name!r}: choose one of {', '.join(PRECISIONS)}, or one with +32 behind it")
    if plus and form.bits >= BF16_BITS:
        raise ConfigError(
            "kv_dtype",
            f"{name!r}: rows in {codec} are not rounded below 16 bits, so none are kept beside them: leave {NEWEST}{newest} away",
        )
    return replace(form, name=f"{codec}{NEWEST}{int(newest)}", newest=int(newest)) if plus else form

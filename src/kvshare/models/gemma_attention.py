"""Attention as Gemma 3, 3n and 4 have it: queries and keys normed head by head and then rotated; some layers read another's rows.

Gemma 3n and 4 also norm the values, without a weight, and use no 1 / sqrt(width): the norms' weights set the scale. In Gemma 4's
full layers keys and values may be two norms of one projection (`layers/key_from_value.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kvshare.cache.step import KeyRebuild, Step
from kvshare.layers.key_from_value import KeyFromValue, KeyRotations, rotated_part
from kvshare.layers.linear import Linear
from kvshare.layers.norm import RMSNorm
from kvshare.layers.reader import KeyProjection
from kvshare.layers.rotary import Rotation
from kvshare.layout import Stream


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the attention of all layers of a model has in common."""

    hidden_size: int
    num_heads: int  # query heads
    eps: float
    bias: bool = False  # of the projections
    scale: float = 1.0  # on the scores
    norm_offset: float = 0.0  # 1 where the norms' weights are stored minus 1
    norms_values: bool = True
    reader_projections: frozenset[str] = frozenset()  # of "k" and "v": what every reader of an owner map has a matrix for


class Attention(nn.Module):
    def __init__(self, shape: AttentionShape, index: int, streams: Sequence[Stream], owns: bool, key_rotations: KeyRotations | None = None):
        """`streams` are those that the layer attends to; `key_rotations` is given where its keys and values share a projection."""
        super().__init__()
        self.index, self.owns, self.scale, self.key_rotations = index, owns, shape.scale, key_rotations
        self.num_heads, self.num_kv_heads, self.head_dim = shape.num_heads, streams[0].heads, streams[0].width
        self.q_size = self.num_heads * self.head_dim
        self.stored = frozenset(stream.name for stream in streams)
        self.rebuild: KeyRebuild | None = None  # how the owner's keys are made, where they are not stored
        self.q_norm = RMSNorm(self.head_dim, shape.eps, offset=shape.norm_offset)
        self.num_projections = 1  # a reader has no keys and values of its own
        if self.owns:
            self.num_projections = 3 if key_rotations is None else 2
            self.k_norm = RMSNorm(self.head_dim, shape.eps, offset=shape.norm_offset)
            self.v_norm = RMSNorm(self.head_dim, shape.eps, weighted=False) if shape.norms_values else nn.Identity()
        kv_size = (self.num_projections - 1) * self.num_kv_heads * self.head_dim
        self.qkv = Linear(shape.hidden_size, self.q_size + kv_size, shape.bias)
        self.output = Linear(self.q_size, shape.hidden_size, shape.bias)
        projects = "k" in shape.reader_projections and not self.owns
        self.key_projection = KeyProjection(self.num_kv_heads, self.head_dim) if projects else None

    def append(self, x: Tensor, rotation: Rotation, step: Step) -> Tensor | None:  # [tokens, hidden]
        """Keys and values of every token go into the cache. Returns the queries' heads where every token goes on."""
        narrows = step.narrows(self.index)
        projected = self.qkv.part(x, self.q_size if narrows else 0, self.qkv.out_features)
        num_heads = (0 if narrows else self.num_heads, *(self.num_kv_heads,) * (self.num_projections - 1))
        heads = projected.view(x.shape[0], sum(num_heads), self.head_dim)  # [tokens, heads, head_dim], as all of its parts
        q, *kv = heads.split_with_sizes(num_heads, dim=1)
        rows = {"v": self.v_norm(kv[-1])}
        if "k" in self.stored:
            rows["k"] = rotation.half_split(kv[0], self.k_norm)
        elif "k_rotated" in self.stored and self.key_rotations is not None:
            rows["k_rotated"] = rotated_part(rotation.half_split(kv[0], self.k_norm), self.key_rotations.moving)
        step.append(self.index, rows)
        return None if narrows else q

    @property
    def keys_from(self) -> KeyFromValue:
        """This owner's keys from what it stores."""
        assert self.key_rotations is not None
        return KeyFromValue(self.k_norm, self.key_rotations)

    def forward(self, x: Tensor, q: Tensor | None, rotation: Rotation, step: Step) -> Tensor:  # [tokens, hidden]
        """`q` is what `append` returned, if it did."""
        if q is None:
            q = self.qkv.part(x, 0, self.q_size).view(x.shape[0], self.num_heads, self.head_dim)
        queries = rotation.half_split(q, self.q_norm)
        if self.key_projection is not None:
            queries = self.key_projection(queries)
        out = step.attend(self.index, queries, scale=self.scale, rebuild=self.rebuild)
        return self.output(out.flatten(1))

    def names(self, module: str) -> tuple[str, ...]:
        """The checkpoint's modules that make up one of this layer's: `qkv` is as many as it has projections."""
        return _NAMES[module][: self.num_projections] if module == "qkv" else _NAMES[module]


_NAMES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "output": ("self_attn.o_proj",),
    "key_projection": ("self_attn.shared_k_proj",),
}

"""What the engine asks of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kvshare.cache.step import Step
from kvshare.layout import CacheLayout

if TYPE_CHECKING:
    from kvshare.checkpoints.source import Source


class Model(nn.Module, ABC):
    """A language model over a flat batch of tokens. It declares its cache (`layout`) and sees it only through a `Step`.

    Built on the meta device; `weight_sources` says where each parameter and persistent buffer comes from.
    """

    layout: CacheLayout
    vocab_size: int
    memory_mapped: frozenset[str] = frozenset()  # parameters that stay views of the file (large tables read a few rows at a time)
    keep_float32: frozenset[str] = frozenset()  # parameters that are not cast to the model's dtype
    released_as: tuple[str, ...] = ()  # checkpoint layouts that load besides transformers' own names, for the support table
    unsupported: tuple[str, ...] = ()  # what of the published models does not run, for the support table
    takes_reader_projections = False  # whether readers may have `layers.reader` maps of their own

    @abstractmethod
    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] int64 -> [rows kept, hidden]
        """Hidden states behind the final norm, of the rows that the step keeps; appends to the cache on the way."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:  # [rows, hidden] -> [rows, vocab_size]
        """Scores of the next token. Callers pass few rows at a time: a [prompt, vocabulary] tensor should never exist."""

    def key_balance(self) -> Mapping[int, Tensor]:
        """By owner: factors [kv_heads, width], powers of two, that make its keys as large as their queries, channel by channel.

        Codecs that lose something divide keys by them. Empty where the weights, which must be loaded, do not tell.
        """
        return {}

    @abstractmethod
    def weight_sources(self) -> dict[str, Source]:
        """Name of each parameter and persistent buffer -> the tensors of a checkpoint it is made of."""

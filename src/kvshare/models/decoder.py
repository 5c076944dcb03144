"""What most families put around their blocks: an embedding in front, a norm and a head behind, under the names that Hugging Face uses."""

from __future__ import annotations

from torch import Tensor

from kvshare.checkpoints.source import Source
from kvshare.layers.embedding import Embedding
from kvshare.layers.linear import Linear
from kvshare.layers.norm import RMSNorm
from kvshare.layout import CacheLayout
from kvshare.models.model import Model


class Decoder(Model):
    """A head that is `tied` is the embedding."""

    def __init__(self, layout: CacheLayout, vocab_size: int, hidden_size: int, eps: float, tied: bool, norm_offset: float = 0.0):
        super().__init__()
        self.layout, self.vocab_size = layout, vocab_size
        self.embedding = Embedding(vocab_size, hidden_size)
        self.norm = RMSNorm(hidden_size, eps, offset=norm_offset)
        self.head = None if tied else Linear(hidden_size, vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:  # [rows, hidden] -> [rows, vocab_size]
        return (self.embedding if self.head is None else self.head).scores(hidden)

    def base_sources(self) -> dict[str, Source]:
        """Where the parameters outside the blocks come from."""
        sources = {"embedding.weight": Source(("model.embed_tokens.weight",)), "norm.weight": Source(("model.norm.weight",))}
        if self.head is not None:
            sources["head.weight"] = Source(("lm_head.weight",))
        return sources

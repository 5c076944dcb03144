"""A tiny model with every kind of layer the arena knows, built in memory: full and window owners, and readers of both."""

from __future__ import annotations

import torch

from kvshare.checkpoints.incremental import IncrementalDecoder
from kvshare.layout import CacheLayout, LayerCache
from kvshare.layout.rules.plain import key_value_streams
from kvshare.models.llama import Llama

VOCAB, WINDOW, CONTEXT = 64, 9, 256
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


def layout() -> CacheLayout:
    """Owners 0 (window), 1 (full), 2 (window); readers 3 of 2 and 4 of 1: a tail of two layers."""
    windows = {0: WINDOW, 1: None, 2: WINDOW}
    owned = tuple(LayerCache("sliding" if windows[i] else "full", i, key_value_streams(2, 8, windows[i])) for i in range(3))
    return CacheLayout((*owned, LayerCache("sliding", 2), LayerCache("full", 1)), "llama", CONTEXT)


def model(seed: int = 0) -> Llama:
    tiny = Llama(CONFIG, layout()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tiny.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return tiny


class LetterTokenizer:
    """Token i is one letter; what the engine needs of a tokenizer, without a file."""

    eos_ids = frozenset({1})

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [2] * special + [3 + ord(letter) % (VOCAB - 3) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("A") + token) for token in ids)

    def stream(self) -> IncrementalDecoder:
        return IncrementalDecoder(self.decode)

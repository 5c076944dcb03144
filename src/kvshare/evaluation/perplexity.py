"""Perplexity: exp of the mean negative log-likelihood of a text's tokens, in windows that each begin anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvshare.cache.step import DenseStep
from kvshare.checkpoints.progress import Progress
from kvshare.checkpoints.tokenizer import Tokenizer
from kvshare.errors import RequestError
from kvshare.models.model import Model

HEAD_ROWS = 64  # rows of logits that exist at once


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`tokens` were predicted, in `windows` forward passes; `nats` is their mean negative log-likelihood."""

    nats: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def text_windows(tokenizer: Tokenizer, text: str, window: int = 1024) -> list[list[int]]:
    """`text` as token ids in windows of `window`, each behind <bos> where the model needs that.

    The last window is shorter, and left out if nothing in it would be predicted. Raises `RequestError` for a text of less than two tokens.
    """
    ids = tokenizer.encode(text)
    begin = ids[:1] if ids[:1] == [tokenizer.bos_id] and len(tokenizer.encode("")) == 1 else []
    body, size = ids[len(begin) :], window - len(begin)
    windows = [begin + body[start : start + size] for start in range(0, len(body), size)]
    windows = [ids for ids in windows if len(ids) > 1]
    if not windows:
        raise RequestError(f"a text of {len(ids)} tokens has no token to predict: give more")
    return windows


@torch.inference_mode()
def perplexity(model: Model, windows: Sequence[Sequence[int]], progress: Progress | None = None) -> Perplexity:
    """The perplexity of `model` on windows of token ids. In each, all tokens but the first are predicted from those before them."""
    total, done, count = 0.0, 0, sum(len(ids) for ids in windows)
    for ids in windows:
        for logits, targets in _predictions(model, torch.tensor(ids)):
            chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None])
            total -= chosen.double().sum().item()
        done += len(ids)
        if progress:
            progress(done, count)
    predicted = count - len(windows)
    return Perplexity(total / predicted, predicted, len(windows))


def _predictions(model: Model, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [rows, vocab] and the tokens that they predict [rows], a slice of the window at a time."""
    hidden = model(ids, DenseStep(model.layout, [len(ids)]))[:-1]
    for start in range(0, len(hidden), HEAD_ROWS):
        yield model.logits(hidden[start : start + HEAD_ROWS]), ids[start + 1 : start + 1 + HEAD_ROWS]

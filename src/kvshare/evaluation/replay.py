"""Running a model again from the layer on in which something differs: what lies in front of it was computed before, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kvshare.models.model import Model


class BlockOutputs:
    """What each of a model's blocks returned in one forward pass: to be returned again in others over the same tokens.

    Takes models whose `blocks` are called one after the other with hidden states [tokens, ...] first, and return these first and the rest
    of their arguments behind them as they were. `count` blocks in front, none in others, can be spared.
    """

    def __init__(self, model: Model):
        blocks = getattr(model, "blocks", None)
        self._blocks = list(blocks) if isinstance(blocks, nn.ModuleList) and len(blocks) == len(model.layout.layers) else []
        self._layout = model.layout
        self._hidden: list[Tensor] = []

    @property
    def count(self) -> int:
        return len(self._hidden)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """In the block, every forward pass leaves its outputs here instead of those of the one before."""

        def record(block: nn.Module) -> Callable[..., Any]:
            def forward(x: Tensor, *rest: Any) -> Any:
                found = type(block).forward(block, x, *rest)
                if self.count == self._blocks.index(block) and _passes_on(found, rest):
                    self._hidden.append(found[0].clone())
                return found

            return forward

        self._hidden = []
        with _replaced({block: record(block) for block in self._blocks}):
            yield

    @contextmanager
    def replayed(self, first: int) -> Iterator[None]:
        """In the block, forward passes compute nothing in front of layer `first` except owners that a layer from there on reads."""

        def replay(number: int) -> Callable[..., Any]:
            return lambda x, *rest: (self._hidden[number].clone(), *rest)

        read = {self._layout.owner[layer] for layer in range(first, len(self._layout.layers))}
        spared = [number for number in range(min(first, self.count)) if number not in read]
        with _replaced({self._blocks[number]: replay(number) for number in spared}):
            yield


def _passes_on(found: Any, rest: tuple[Any, ...]) -> bool:
    return isinstance(found, tuple) and len(found) == 1 + len(rest) and all(a is b for a, b in zip(found[1:], rest, strict=True))


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    try:
        for block, forward in forwards.items():
            block.forward = forward
        yield
    finally:
        for block in forwards:
            vars(block).pop("forward", None)

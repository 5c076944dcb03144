"""Where a parameter comes from: the tensors of a checkpoint that make it up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Which checkpoint tensors make up one parameter. Without `combine` one is taken as it is and several are joined along dimension 0.

    `stack` is how many matrices the joined rows are, one below the other: [rows, columns] become [stack, rows / stack, columns].
    `combine` must be a pure function of the tensors: it is run on the meta device first, to learn the shape it gives.
    `otherwise` is what is taken from a checkpoint that does not hold all of `names`: a released model and its re-save may differ in them.
    """

    names: tuple[str, ...]
    combine: Callable[[list[Tensor]], Tensor] | None = None
    otherwise: Source | None = None
    stack: int | None = None

    def present_in(self, names: Collection[str]) -> Source:
        """This source, or the first of those behind it whose tensors are all in `names`; this one if none is."""
        source: Source | None = self
        while source is not None and not all(name in names for name in source.names):
            source = source.otherwise
        return source or self

    def shape_of(self, shapes: Sequence[Shape]) -> Shape | None:
        """The shape that tensors of these shapes give together; None where they do not fit each other."""
        if self.combine is not None:
            try:
                return tuple(self.combine([torch.empty(shape, device="meta") for shape in shapes]).shape)
            except (RuntimeError, IndexError, ValueError, TypeError):
                return None
        joined = _joined(shapes)  # worked out by hand: the first use of the meta device imports a second's worth of torch
        if self.stack is None or joined is None:
            return joined
        return (self.stack, joined[0] // self.stack, *joined[1:]) if joined and joined[0] % self.stack == 0 else None


def _joined(shapes: Sequence[Shape]) -> Shape | None:
    if len(shapes) == 1:
        return shapes[0]
    fits = all(shapes) and len({shape[1:] for shape in shapes}) == 1
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if fits else None

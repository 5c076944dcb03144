"""Where kernels find a state of each sequence of a step, and change it in place."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvshare.cache.arena import Arena
from kvshare.kernels.step_spans import StepSpans


class StateInPlace(NamedTuple):
    """Bytes `begin:end` of every sequence's state pages, as they lie end to end; `run` of its page runs are those pages."""

    spans: StepSpans
    arena: Arena
    run: int
    begin: int
    end: int
    dtype: torch.dtype

    @property
    def place(self) -> tuple[int, int, int, int, int]:
        """What native calls take."""
        return self.arena.pages.data_ptr(), self.arena.page_bytes, self.run, self.begin, self.end

"""The step that a recording is made from (`kvshare.kernels.program`)."""

from __future__ import annotations

from typing import Any

from kvshare.cache.paged_step import PagedStep
from kvshare.kernels.program import not_recorded
from kvshare.kernels.step_spans import StepSpans

_CHANGES = frozenset({"past", "spans", "caches"})  # from step to step; positions do, too, but in memory that is filled anew


class RecordedStep(PagedStep):
    """A step of one token a sequence. Kernels are told of it by `native_spans`; what else Python learns of it cannot be run again."""

    def prepare(self) -> StepSpans:
        """Work out, before a recording begins, what holds for every step of as many sequences."""
        if not self.all_single:
            raise RuntimeError("only steps of one token a sequence can be run again")
        return self.native_spans

    def __getattribute__(self, name: str) -> Any:
        if name in _CHANGES:
            not_recorded(f"the model asks for the step's {name}")
        return super().__getattribute__(name)

"""Tests of kernels run on every instruction set that the processor has, and beside their twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from kernels.twins import Both
from torch import Tensor

from kvshare import kernels
from kvshare.kernels import edges, small_ops
from kvshare.kernels.native import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_isa(request.param) as has:
        if not has:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    """`both(run, x, ...)` is what the kernels make of `run(x, ...)`, and what the layers' plain torch does."""

    @torch.no_grad()
    def run_both(run: Callable[..., Tensor], x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        assert small_ops.takes(x) or edges.takes(x, torch.float32), "the kernels do not even take this"
        native = run(x, *others)
        with monkeypatch.context() as patch:
            for module in (small_ops, edges):
                patch.setattr(module, "available", lambda: False)
            return native, run(x, *others)

    return run_both

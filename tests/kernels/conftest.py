"""Tests of kernels run on every instruction set that the processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvshare import kernels
from kvshare.kernels.native import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_isa(request.param) as has:
        if not has:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param

"""Finding the compiled kernels, and choosing the instruction set they run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch  # noqa: F401  # first: the kernels take their OpenMP, one pool of threads for both, from the library that torch has loaded

from kvshare.errors import RequestError

ISAS = ("amx", "avx512", "avx2", "plain")  # best first


@cache
def _load() -> tuple[Any, str]:
    """The compiled module, or None and why there is none."""
    if os.environ.get("KVSHARE_KERNELS") == "0":
        return None, "KVSHARE_KERNELS=0"
    try:
        from kvshare import _kernels
    except ImportError as error:
        return None, str(error)
    wanted = os.environ.get("KVSHARE_ISA")
    if wanted and not _kernels.use_isa(wanted):
        raise RequestError(
            f"KVSHARE_ISA={wanted}: this processor or this build has no such instruction set; choose one of {', '.join(ISAS)} or unset it"
        )
    return _kernels, ""


def available() -> bool:
    """Whether the kernels were built for this Python and are not switched off."""
    return _load()[0] is not None


def reason_unavailable() -> str:
    """Why `available()` is false; empty where it is true."""
    return _load()[1]


def isa() -> str:
    """The instruction set in use, one of `ISAS`; "torch" without kernels."""
    return module().isa() if available() else "torch"


@contextmanager
def use_isa(name: str) -> Iterator[bool]:
    """Run on another instruction set; gives whether this processor has it (if not, nothing changes)."""
    before = isa()
    has = available() and module().use_isa(name)
    try:
        yield has
    finally:
        if has:
            module().use_isa(before)


def module() -> Any:
    """The compiled module itself. Only where `available()`."""
    native, reason = _load()
    if native is None:
        raise RuntimeError(f"kvshare's kernels are not available: {reason}")
    return native

"""A plugin for pytest: an emulator answers for AMX's instructions, and every test must have run some and left no thread's tiles configured.

Loaded with `-p kernels.amx_emulation -p no:faulthandler` (which takes the signal for itself), KVSHARE_EMULATED=amx, and in
KVSHARE_AMX_EMULATOR the place of the emulator that `library` has compiled.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def library(path: Path) -> ctypes.CDLL:
    """The emulator, compiled there if it is not there yet."""
    if not path.exists():
        source = Path(__file__).with_name("amx_emulator.c")
        subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, source], check=True)
    emulator = ctypes.CDLL(str(path))
    emulator.emulator_executed.restype = emulator.emulator_configured_threads.restype = ctypes.c_long
    return emulator


@pytest.fixture(scope="session")
def emulator() -> ctypes.CDLL:
    emulator = library(Path(os.environ["KVSHARE_AMX_EMULATOR"]))
    assert emulator.emulator_install() == 0
    return emulator


@pytest.fixture(autouse=True)
def instructions_were_executed(emulator: ctypes.CDLL) -> Iterator[None]:
    before = emulator.emulator_executed()
    yield
    assert emulator.emulator_executed() > before, "no instruction of AMX ran"
    assert emulator.emulator_configured_threads() == 0, "tiles are configured still, which torch's code on that thread does not expect"

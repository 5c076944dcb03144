"""The compiled module: found or not, one pool of threads with torch, instruction sets by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kvshare import kernels
from kvshare.kernels.native import ISAS, module

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")


def run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter, with this one's path."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_kvshare_loads_no_kernels() -> None:
    assert run("import sys, kvshare; print([m for m in ('torch', 'numpy', 'kvshare._kernels') if m in sys.modules])") == "[]"


def test_kernels_can_be_switched_off() -> None:
    code = "from kvshare import kernels; print(kernels.available(), kernels.isa(), kernels.reason_unavailable())"
    assert run(code, KVSHARE_KERNELS="0") == "False torch KVSHARE_KERNELS=0"


@needs_kernels
def test_instruction_set_is_chosen_by_name() -> None:
    assert run("from kvshare import kernels; print(kernels.isa())", KVSHARE_ISA="plain") == "plain"
    code = "from kvshare import kernels, errors\ntry: kernels.isa()\nexcept errors.RequestError as error: print(error)"
    assert "KVSHARE_ISA=sse9" in run(code, KVSHARE_ISA="sse9")


@needs_kernels
def test_use_isa_restores_the_one_before() -> None:
    before = kernels.isa()
    with kernels.use_isa("plain") as has:
        assert has
        assert kernels.isa() == "plain"
    assert kernels.isa() == before
    assert before in ISAS
    with kernels.use_isa("sse9") as has:
        assert not has
        assert kernels.isa() == before


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_serves_torch_and_kernels() -> None:
    """Two libraries would mean two pools of threads, spinning against each other."""
    module()
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "/libgomp" in line or "/libomp" in line or "/libiomp" in line}
    assert len(libraries) == 1
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert module().num_threads() == count
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kernels_run_on_torchs_threads() -> None:
    """After both have run in parallel, no more threads exist than after torch alone."""
    code = """
import os, torch
torch.set_num_threads(3)
torch.ones(1 << 22).sum(); torch.mm(torch.ones(512, 512), torch.ones(512, 512))
before = len(os.listdir("/proc/self/task"))
from kvshare.kernels.native import module
assert module().num_threads() == 3
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run(code) == "0"

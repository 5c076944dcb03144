"""AMX on processors that have none: the kernels' tests and tiny models run with an emulator of its instructions, in processes of their own.

Where the processor has AMX nothing here runs: every other test runs on it there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.amx_emulation import library
from torch import Tensor

from kvshare import kernels


def _why_not() -> str:
    if not kernels.available():
        return f"kernels: {kernels.reason_unavailable()}"
    with kernels.use_isa("avx512") as below, kernels.use_isa("amx") as native:
        if not below or native:
            return "this processor has AMX itself" if native else "the AMX set needs AVX512 as well"
    return "" if sys.platform == "linux" and shutil.which("cc") else "needs Linux and a C compiler"


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("amx") / "emulator.so"
    library(path)
    return path


def test_what_runs_on_tiles(compiled: Path) -> None:
    """Attention and an indexer's scores against torch, on several threads, and tiny models against the plain set."""
    files = ["kernels/test_tile_attention", "kernels/test_row_selection", "cache/test_tiled_attention", "engine/test_families_on_every_set"]
    chosen = "amx and not 300 and not 512 or alike and bf16 or rebuilt and int8 or predictions"  # seconds, not minutes
    plugins = ["-p", "kernels.amx_emulation", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    added = {"KVSHARE_EMULATED": "amx", "KVSHARE_ISA": "amx", "KVSHARE_AMX_EMULATOR": str(compiled)}
    root, paths = Path(__file__).parents[2], [Path(__file__).parents[1] / f"{file}.py" for file in files]
    command = [sys.executable, "-m", "pytest", *plugins, "-q", "--rootdir", root, "-k", chosen, *paths]
    ran = subprocess.run(command, env={**os.environ, **added, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    assert int(ran.stdout.split(" passed")[0].split()[-1]) >= 50, ran.stdout


MULTIPLY = """
import ctypes, sys
emulator = ctypes.CDLL(sys.argv[1])
assert emulator.emulator_install() == 0
parts = [ctypes.create_string_buffer(sys.stdin.buffer.read(size), size) for size in (64, 1024, 1024, 1024)]
emulator.multiply_with_instructions(*parts)
assert emulator.emulator_executed() == 8 and emulator.emulator_configured_threads() == 0
sys.stdout.buffer.write(parts[3].raw)
"""


def configuration(rows: int = 16, row_bytes: int = 64, palette: int = 1) -> Tensor:  # 64 bytes, see LDTILECFG
    return torch.tensor([palette, *[0] * 15, *[row_bytes, 0] * 8, *[0] * 16, *[rows] * 8, *[0] * 8], dtype=torch.uint8)


def multiplied(compiled: Path, shapes: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """c [16, 16] + a [16, 32] x b [16, 32], where b has pairs of rows side by side."""
    given = b"".join(each.contiguous().view(torch.uint8).numpy().tobytes() for each in (shapes, a.bfloat16(), b.bfloat16(), c))
    ran = subprocess.run([sys.executable, "-c", MULTIPLY, compiled], input=given, capture_output=True)
    if ran.returncode:
        raise Refused(f"{ran.returncode}: {ran.stderr.decode()}")
    return torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32).view(16, 16)


class Refused(Exception):
    pass


def test_the_emulator_multiplies_integers_exactly(compiled: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (16, 32), generator=generator).float() for _ in range(2))
    c = torch.randn(16, 16, generator=generator).round()
    columns = b.view(16, 16, 2).permute(0, 2, 1).reshape(32, 16)
    assert torch.equal(multiplied(compiled, configuration(), a, b, c), c + a @ columns)


def test_the_emulator_rounds_as_the_manual_says(compiled: Path) -> None:
    """By hand: even and odd numbers of the pairs are summed up apart, each sum rounded at once, and denormals are zeros."""
    a, b, c = torch.zeros(16, 32), torch.zeros(16, 32), torch.zeros(16, 16)
    a[0, :6:2], b[:3, 0] = torch.tensor([4096.0, 1.0, -4096.0]), torch.tensor([4096.0, 1.0, 4096.0])  # 2^24 + 1 is 2^24: 0 is left of 1
    a[0, 1], b[0, 1] = 0.5, 1.0  # which odd numbers know nothing of
    c[0, 0] = 8.0
    a[1, 0], b[0, 2] = 2.0**-130, 2.0**100  # a denormal: times anything zero
    a[2, 0], b[0, 4] = 2.0**-70, 2.0**-70  # a product below the normal numbers
    c[3, 3] = 2.0**-130  # a denormal to begin with
    a[4, 0], b[0, 6] = 2.0**-60, 2.0**-60  # just above
    found = multiplied(compiled, configuration(), a, b, c)
    assert [found[0, 0], found[1, 1], found[2, 2], found[3, 3], found[4, 3]] == [8.5, 0, 0, 0, 2.0**-120]


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (configuration(palette=0), "not configured"),
        (configuration(palette=2), "palette"),
        (configuration(rows=17), "impossible shape"),
        (configuration(rows=0), "impossible shape"),
        (configuration(rows=8), "shapes disagree"),
    ],
)
def test_the_emulator_refuses_what_processors_refuse(shapes: Tensor, reason: str, compiled: Path) -> None:
    with pytest.raises(Refused, match=f"99: amx emulator: .*{reason}"):
        multiplied(compiled, shapes, torch.zeros(16, 32), torch.zeros(16, 32), torch.zeros(16, 16))

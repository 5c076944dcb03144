"""What kvshare finds on this machine: versions, instruction sets, threads, memory, kernels, weights in installed packages."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvshare import __version__
from kvshare.checkpoints.packages import PACKAGES

_DISTRIBUTIONS = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "huggingface-hub", "starlette")
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16")


def environment() -> dict[str, Any]:
    """The report, as JSON values. Nothing in it depends on a model."""
    import psutil
    import torch

    from kvshare import kernels

    memory = psutil.virtual_memory()
    return {
        "kvshare": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _DISTRIBUTIONS},
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "instruction_sets": instruction_sets(),
        "torch_runs": torch.backends.cpu.get_cpu_capability(),
        "kernels": {"built": kernels.available(), "runs": kernels.isa(), "reason": kernels.reason_unavailable()},
        "memory_bytes": {"total": memory.total, "available": memory.available},
        "devices": {
            "cpu": "measured and tested",
            "cuda": _device(torch.cuda.is_available()),
            "mps": _device(torch.backends.mps.is_available()),
        },
        "weights": {name: _version(package.distribution) or f"not installed: {package.remedy}" for name, package in PACKAGES.items()},
    }


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of this processor that kernels can use, where the system tells (Linux)."""
    if not cpuinfo.exists():
        return []
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            present = set(value.split())
            return [flag for flag in _FLAGS if flag in present]
    return []


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _device(present: bool) -> str:
    return "present, untested" if present else "none"

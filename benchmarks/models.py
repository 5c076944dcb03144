"""What each engine loads: the named model, its plain weights, or a GGUF file of it; made once and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import Engine
from benchmarks.shapes import checkpoint, unpacked


@dataclass(frozen=True, slots=True)
class Model:
    """`given` is what `kvshare` reads: a GGUF file, or the plain weights themselves."""

    given: Path
    where: Path  # what is made is kept below it

    def file_for(self, engine: Engine) -> Path:
        """What this engine loads; plain weights and GGUF files are made when the first engine wants them."""
        if engine.reads == "as given":
            return self.given
        if self.given.suffix == ".gguf":
            return self.given if engine.reads == "gguf" else self.plain
        return self.given if engine.reads == "plain" else gguf(self.given, "BF16", self.where)

    @property
    def plain(self) -> Path:
        """The weights as 16-bit floats in a Hugging Face directory."""
        if self.given.suffix != ".gguf":
            return self.given
        made_from = self.where / self.given.stem.rpartition("-")[0]  # `gguf` names its files so
        return made_from if self.given.parent == self.where and made_from.is_dir() else unpacked(self.given, self.where)


def prepare(shape: str | None, model: str | None, block_type: str | None, where: Path) -> Model:
    """The model that `--shape` or `--model` names, in GGUF blocks of `block_type` where that is given."""
    from kvshare.checkpoints.resolve import locate

    path = checkpoint(shape, where) if shape else locate(model or "")
    return Model(gguf(path, block_type, where) if block_type else path, where)


def gguf(directory: Path, block_type: str, where: Path) -> Path:
    """A GGUF file of a Hugging Face directory, made by llama.cpp's own converter and quantizer if it is not there.

    LLAMA_CPP is llama.cpp's source tree, LLAMA_CPP_BIN the directory of its programs. The file of 16-bit floats is kept beside the others.
    """
    file = where / f"{directory.name}-{block_type}.gguf"
    if file.exists():
        return file
    unfinished = file.with_suffix(".part")
    if block_type == "BF16":
        converter = Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"
        _call(sys.executable, converter, directory, "--outtype", "bf16", "--outfile", unfinished)
    else:
        quantizer = Path(os.environ.get("LLAMA_CPP_BIN", "")) / "llama-quantize"
        _call(quantizer, gguf(directory, "BF16", where), unfinished, block_type, os.cpu_count() or 1)
    return unfinished.rename(file)


def _call(*words: str | Path | int) -> None:
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"{words[0]} is not there: set LLAMA_CPP to llama.cpp's source tree, LLAMA_CPP_BIN to its programs") from None
    if done.returncode:
        raise SystemExit(f"{words[0]} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")

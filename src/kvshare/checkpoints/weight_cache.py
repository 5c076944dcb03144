"""Quantized weights on disk: one safetensors file of blocks (uint8 [rows, row bytes]) for a checkpoint and a precision.

The file gets its name only when it is whole and on disk, so that whoever finds it may map it. Who writes holds a lock on the unfinished
file: others wait and then map what was written, and one that was killed leaves a file without a lock, which the next one begins anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvshare.checkpoints.checkpoint import Checkpoint
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.gguf_header import BlockType
from kvshare.checkpoints.progress import Notice, Progress
from kvshare.checkpoints.user_cache import cache_directory

FORMAT = 1  # to be raised when the same source and precision give other bytes
_KEY = "kvshare"  # of the file's metadata
_ALIGNMENT = 4096  # of the first tensor in the file


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file: `shape` counts numbers, `form` says how they are stored."""

    name: str
    form: BlockType
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, int]:  # (rows, row bytes)
        return prod(self.shape[:-1]), self.shape[-1] // self.form.block_size * self.form.block_bytes


class Unusable(Exception):
    """Why there is nothing to map; an empty message where no file is there."""


class WeightCache:
    """The file for `entries` of a checkpoint, in the user's cache."""

    def __init__(self, checkpoint: Checkpoint, precision: str, entries: Sequence[Entry]):
        self.entries = tuple(entries)
        sources = [(file.name, found.st_size, found.st_mtime_ns) for file in checkpoint.files for found in (file.stat(),)]
        types = {entry.name: entry.form.name for entry in self.entries}
        self._identity = json.dumps({"format": FORMAT, "precision": precision, "sources": sources, "types": types})
        first = checkpoint.files[0]
        where = (first if first.suffix == ".gguf" else first.parent).resolve()
        name = f"{where.stem if first.suffix == '.gguf' else where.name}-{precision}"
        digest = blake2b(str(where).encode(), digest_size=6).hexdigest()
        self.path = cache_directory() / "weights" / f"{name}-{digest}.safetensors"
        self.nbytes = sum(prod(entry.stored_shape) for entry in self.entries)

    def open(self) -> dict[str, PackedBlocks]:
        """The blocks of every entry, views of the mapped file. Raises `Unusable` for one that is not there, not whole or not of these."""
        if not self.path.exists():
            raise Unusable
        try:
            file = safe_open(self.path, framework="pt")  # checks that the tensors' bytes fill the file to its end
        except (SafetensorError, OSError, ValueError) as error:
            raise Unusable(f"is not sound ({error})") from None
        if (file.metadata() or {}).get(_KEY) != self._identity:
            raise Unusable("was made of other files, or by another version")
        stored = {name: (each.get_dtype(), tuple(each.get_shape())) for name in file.keys() for each in (file.get_slice(name),)}  # noqa: SIM118
        if stored != {entry.name: ("U8", entry.stored_shape) for entry in self.entries}:
            raise Unusable("holds other tensors")
        return {entry.name: PackedBlocks(entry.form, entry.shape, file.get_tensor(entry.name)) for entry in self.entries}

    def make(self, blocks: Callable[[Entry], Iterable[Tensor]], progress: Progress | None, notice: Notice) -> dict[str, PackedBlocks]:
        """Write the file, unless another process does meanwhile, and open it. `blocks` gives an entry's rows of blocks, some at a time.

        Raises `OSError` where the file cannot be written; then nothing is left of it.
        """
        with _sole_writer(self.path.with_name(f".{self.path.name}.unfinished"), notice) as file:
            try:
                return self.open()
            except Unusable as found:
                if str(found):
                    notice(f"{self.path} {found}: the weights are quantized again")
            room = shutil.disk_usage(self.path.parent).free
            if room < self.nbytes:
                raise OSError(f"{self.nbytes:,} bytes are needed, {room:,} are free")
            self._write(file, blocks, progress)
            os.replace(file.name, self.path)
            _sync_directory(self.path.parent)
        return self.open()

    def _write(self, file: BinaryIO, blocks: Callable[[Entry], Iterable[Tensor]], progress: Progress | None) -> None:
        file.write(self._header())
        done = 0
        for entry in self.entries:
            for rows in blocks(entry):
                file.write(rows.numpy().data)
                done += rows.nbytes
                if progress:
                    progress(done, self.nbytes)
        file.flush()
        os.fsync(file.fileno())

    def _header(self) -> bytes:
        """The length of the description, and the description, padded with spaces."""
        fields: dict[str, Any] = {"__metadata__": {_KEY: self._identity}}
        end = 0
        for entry in self.entries:
            start, end = end, end + prod(entry.stored_shape)
            fields[entry.name] = {"dtype": "U8", "shape": entry.stored_shape, "data_offsets": [start, end]}
        text = json.dumps(fields).encode()
        size = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8
        return size.to_bytes(8, "little") + text.ljust(size)


@contextmanager
def _sole_writer(path: Path, notice: Notice) -> Iterator[BinaryIO]:
    """The file at `path`, empty and locked. Whoever comes second waits. It is removed at the end, unless it was renamed."""
    import fcntl  # not on every system that can plan

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notice("another process is quantizing these weights: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # the one before us was done and renamed it
                continue
            try:
                file.truncate(0)
                yield file
            finally:
                if _is_at(file, path):
                    with suppress(OSError):
                        path.unlink()
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync_directory(path: Path) -> None:
    """Put the directory's entries on disk too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

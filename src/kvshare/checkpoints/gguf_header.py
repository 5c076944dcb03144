"""The header of a GGUF file, version 2 or 3: metadata and where each tensor lies. Pure Python, no numpy: `kvshare plan` reads it too.

A file may come from anywhere, so everything it says is checked against its size before it is believed: lengths, counts,
and for each tensor that shape times type is the bytes that are there. (The `gguf` package maps every string into a numpy
object first, which takes ten seconds for a vocabulary of 262,144, and believes the shapes.)
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from kvshare.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_MOST_NESTING = 4  # arrays in arrays


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a tensor's numbers are stored: blocks of `block_size` numbers in `block_bytes` bytes, along the last dimension."""

    name: str
    block_size: int
    block_bytes: int


BLOCK_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
"""The types that load, by their number in the file."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file; `shape` is outermost first, as torch has it (the file has it the other way round)."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_header(path: str | Path) -> GGUFHeader:
    """The checked header of a GGUF file. Raises `CheckpointError` for a file that is truncated, lies about its contents, or is no GGUF."""
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, _Cursor(data, path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no GGUF file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


class _Cursor:
    """Reads little-endian values one after the other and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} ({self.size} bytes) is no sound GGUF file: {problem}. Download it again")

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.fail(f"at byte {self.at} it announces {count} bytes, and {self.size - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def count(self) -> int:
        return self.scalar(_UINT64)

    def text(self) -> str:
        start = self.at
        try:
            return self.take(self.count()).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the text at byte {start} is not UTF-8") from None

    def array(self, nesting: int) -> list[Any]:
        kind, length = self.scalar(_UINT32), self.count()
        if kind in _SCALARS:
            form = _SCALARS[kind]
            if length > (self.size - self.at) // form.size:
                raise self.fail(f"at byte {self.at} it announces {length} numbers, and {self.size - self.at} bytes are left")
            return list(struct.unpack(f"<{length}{form.format[-1]}", self.take(length * form.size)))
        read = self.reader(kind, nesting + 1)
        if length > (self.size - self.at) // _UINT64.size:
            raise self.fail(f"at byte {self.at} it announces {length} entries, and {self.size - self.at} bytes are left")
        return [read() for _ in range(length)]

    def reader(self, kind: int, nesting: int = 0) -> Callable[[], Any]:
        """What reads a value of the file's type number `kind`."""
        if kind in _SCALARS:
            return partial(self.scalar, _SCALARS[kind])
        if kind == _STRING:
            return self.text
        if kind == _ARRAY and nesting < _MOST_NESTING:
            return partial(self.array, nesting)
        raise self.fail(f"at byte {self.at} it has a value of the unknown type {kind}")


_UINT32, _UINT64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {kind: struct.Struct("<" + letter) for kind, letter in enumerate("BbHhIif?")} | {
    kind: struct.Struct("<" + letter) for kind, letter in ((10, "Q"), (11, "q"), (12, "d"))
}
_STRING, _ARRAY = 8, 9


def _read(path: Path, cursor: _Cursor) -> GGUFHeader:
    if (magic := cursor.take(len(MAGIC))) != MAGIC:
        raise cursor.fail(f"it begins with {magic!r} and not with {MAGIC!r}")
    version = cursor.scalar(_UINT32)
    if version not in _VERSIONS:
        raise cursor.fail(f"it is of version {version}; versions 2 and 3, little-endian, are read")
    num_tensors, num_values = cursor.count(), cursor.count()
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        if key in metadata:
            raise cursor.fail(f"the key {key!r} stands there twice")
        metadata[key] = cursor.reader(cursor.scalar(_UINT32))()
    announced = [_announcement(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise cursor.fail(f"general.alignment is {alignment!r} and not a multiple of 8")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, type_number, offset in announced:
        if name in tensors:
            raise cursor.fail(f"the tensor {name!r} stands there twice")
        tensors[name] = _checked(cursor, name, shape, type_number, start + offset, alignment)
    return GGUFHeader(path, metadata, tensors)


def _announcement(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type number and offset of the next tensor, unchecked but for the number of dimensions."""
    name, dimensions = cursor.text(), cursor.scalar(_UINT32)
    if dimensions > _MOST_DIMENSIONS:
        raise cursor.fail(f"the tensor {name!r} has {dimensions} dimensions; at most {_MOST_DIMENSIONS} are possible")
    shape = tuple(reversed([cursor.count() for _ in range(dimensions)]))
    return name, shape, cursor.scalar(_UINT32), cursor.count()


def _checked(cursor: _Cursor, name: str, shape: tuple[int, ...], type_number: int, offset: int, alignment: int) -> TensorInfo:
    if type_number not in BLOCK_TYPES:
        loads = ", ".join(each.name for each in BLOCK_TYPES.values())
        raise CheckpointError(
            f"{cursor.path}: the tensor {name!r} is stored as {_type_name(type_number)}, which does not load; what loads: {loads}"
        )
    form = BLOCK_TYPES[type_number]
    numbers = prod(shape)
    if not numbers or (shape or (1,))[-1] % form.block_size:
        raise cursor.fail(f"the tensor {name!r} of shape {list(shape)} cannot be cut in rows of {form.name} blocks of {form.block_size}")
    num_bytes = numbers // form.block_size * form.block_bytes
    if offset % alignment or offset + num_bytes > cursor.size:
        raise cursor.fail(f"the tensor {name!r} ({form.name} {list(shape)}: {num_bytes} bytes from byte {offset}) does not lie inside it")
    return TensorInfo(name, form, shape, offset, num_bytes)


def _type_name(type_number: int) -> str:
    try:  # the package knows more names than load here; it need not be installed
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(type_number).name
    except (ImportError, ValueError):
        return f"the unknown type {type_number}"

"""The GGUF header reader believes nothing: it agrees with the `gguf` package on sound files and refuses all others with one clear error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare.checkpoints.gguf_header import BLOCK_TYPES, read_header
from kvshare.errors import CheckpointError

METADATA: dict[str, tuple[gguf.GGUFValueType, Any]] = {
    "test.u8": (gguf.GGUFValueType.UINT8, 200),
    "test.i8": (gguf.GGUFValueType.INT8, -3),
    "test.u16": (gguf.GGUFValueType.UINT16, 60000),
    "test.i16": (gguf.GGUFValueType.INT16, -300),
    "test.u32": (gguf.GGUFValueType.UINT32, 1 << 31),
    "test.i32": (gguf.GGUFValueType.INT32, -(1 << 31)),
    "test.u64": (gguf.GGUFValueType.UINT64, 1 << 63),
    "test.i64": (gguf.GGUFValueType.INT64, -(1 << 63)),
    "test.f32": (gguf.GGUFValueType.FLOAT32, 0.5),
    "test.f64": (gguf.GGUFValueType.FLOAT64, 0.1),
    "test.bool": (gguf.GGUFValueType.BOOL, True),
    "test.text": (gguf.GGUFValueType.STRING, "naïve 日本語"),
    "test.words": (gguf.GGUFValueType.ARRAY, ["a", "", "ß"]),
    "test.numbers": (gguf.GGUFValueType.ARRAY, [1, -2, 3]),
    "test.flags": (gguf.GGUFValueType.ARRAY, [True, False]),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every kind of value and a tensor of every type that loads."""
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, value) in METADATA.items():
        writer.add_key_value(name, value, kind)
    for number, form in BLOCK_TYPES.items():
        blocks = np.full((2, 3 * form.block_bytes), 7, np.uint8)
        writer.add_tensor(f"tensor.{form.name}", blocks, raw_shape=blocks.shape, raw_dtype=gguf.GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_agrees_with_the_gguf_package(sound: Path):
    header, reader = read_header(sound), gguf.GGUFReader(sound)
    for name, (_, value) in METADATA.items():
        assert header.metadata[name] == value == reader.fields[name].contents()
    assert len(reader.tensors) == len(header.tensors) == len(BLOCK_TYPES)
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.type.name == tensor.tensor_type.name
        assert (info.type.block_size, info.type.block_bytes) == gguf.GGML_QUANT_SIZES[tensor.tensor_type]


def test_a_file_cut_anywhere_is_refused(sound: Path, tmp_path: Path):
    data = sound.read_bytes()
    last = max(info.offset + info.num_bytes for info in read_header(sound).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, last, 13), last - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="GGUF file"):
            read_header(cut)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bytes_are_refused_or_describe_what_is_there(sound: Path, data: st.DataObject):
    content = bytearray(sound.read_bytes())
    header_bytes = min(info.offset for info in read_header(sound).tensors.values())
    for at in data.draw(st.lists(st.integers(0, header_bytes - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    flipped = sound.with_name("flipped.gguf")
    flipped.write_bytes(content)
    try:
        header = read_header(flipped)
    except CheckpointError:
        return
    for info in header.tensors.values():
        assert info.num_bytes == int(np.prod(info.shape)) // info.type.block_size * info.type.block_bytes
        assert 0 <= info.offset <= info.offset + info.num_bytes <= len(content)


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _file(*, values: bytes = b"", num_values: int = 0, tensors: bytes = b"", num_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + values + tensors + bytes(256)


def _tensor(shape: tuple[int, ...], type_number: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(b"t") + dimensions + struct.pack("<IQ", type_number, offset)


def _nested(depth: int) -> bytes:
    return _text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no GGUF file"),
        (b"PK\x03\x04" + bytes(100), "begins with"),
        (_file(version=1), "version 1"),
        (_file(version=3 << 24), "little-endian"),
        (_file(num_tensors=1 << 63), "announces|dimensions|bytes"),
        (_file(values=_text(b"k") + struct.pack("<IQ", 8, 1 << 60), num_values=1), "announces 1152921504606846976 bytes"),
        (_file(values=_text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61), num_values=1), "announces 2305843009213693952 numbers"),
        (_file(values=_text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61), num_values=1), "announces 2305843009213693952 entries"),
        (_file(values=_text(b"k") + struct.pack("<I", 13), num_values=1), "unknown type 13"),
        (_file(values=_nested(1000), num_values=1), "unknown type 9"),
        (_file(values=_text(b"\xff\xfe") + struct.pack("<IB", 0, 1), num_values=1), "not UTF-8"),
        (_file(values=(_text(b"k") + struct.pack("<IB", 0, 1)) * 2, num_values=2), "'k' stands there twice"),
        (_file(values=_text(b"general.alignment") + struct.pack("<II", 4, 0), num_values=1), "general.alignment is 0"),
        (_file(tensors=_tensor((1 << 40, 1 << 40)), num_tensors=1), "does not lie inside"),
        (_file(tensors=_tensor((4,), offset=1 << 62), num_tensors=1), "does not lie inside"),
        (_file(tensors=_tensor((4,), offset=4), num_tensors=1), "does not lie inside"),
        (_file(tensors=_tensor((0,)), num_tensors=1), "cannot be cut"),
        (_file(tensors=_tensor((33,), type_number=2), num_tensors=1), "rows of Q4_0 blocks of 32"),
        (_file(tensors=_tensor((), type_number=2), num_tensors=1), "rows of Q4_0 blocks of 32"),
        (_file(tensors=_tensor((1,) * 9), num_tensors=1), "9 dimensions"),
        (_file(tensors=_tensor((256,), type_number=10), num_tensors=1), "stored as Q2_K, which does not load; what loads: F32, F16, Q4_0"),
        (_file(tensors=_tensor((256,), type_number=999), num_tensors=1), "unknown type 999"),
        (_file(tensors=_tensor((4,)) * 2, num_tensors=2), "'t' stands there twice"),
    ],
)
def test_a_lie_is_refused_by_what_it_says(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None], ids=["a directory", "nothing"])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path):
    make(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        read_header(tmp_path / "x.gguf")

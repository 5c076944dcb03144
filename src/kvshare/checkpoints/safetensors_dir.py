"""A directory in Hugging Face's layout: `config.json`, safetensors in one file or in shards with an index, tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from kvshare.checkpoints.json_file import read_json
from kvshare.checkpoints.names import text_model_names
from kvshare.checkpoints.quantized import PLAIN_DTYPES, open_quantized
from kvshare.errors import CheckpointError
from kvshare.layout.config import read_config, text_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvshare.checkpoints.checkpoint import Checkpoint
    from kvshare.checkpoints.gguf_blocks import PackedBlocks
    from kvshare.checkpoints.tokenizer import Tokenizer

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def open_directory(path: Path) -> Checkpoint:
    """The checkpoint in `path`, behind a reader where its config says that it is quantized.

    Raises `CheckpointError` for files that are missing, broken, pickled or in a format that does not load.
    """
    checkpoint = SafetensorsDirectory(path)
    quantization = checkpoint.config.get("quantization_config")
    if isinstance(quantization, dict):
        return open_quantized(checkpoint, quantization)
    checkpoint.check_plain()
    return checkpoint


class SafetensorsDirectory:
    """Every header is read and checked when the directory is opened; tensors are views of the mapped files."""

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = text_config(read_config(path))
        self.generation_config: dict[str, Any] = read_json(path / "generation_config.json")
        self._shard_of = _shards(path)
        self._files = {file: _open(path / file) for file in sorted(set(self._shard_of.values()))}
        self._check_index()
        self._file_names, self.skipped = text_model_names(self._shard_of)

    @property
    def origin(self) -> str:
        files = len(self._files)
        return f"{self.path} ({next(iter(self._files)) if files == 1 else f'{files} safetensors files'})"

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.path / file for file in self._files)

    def names(self) -> frozenset[str]:
        return frozenset(self._file_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype as the safetensors header spells it: "BF16", "F8_E4M3", ..."""
        return self._slice(name).get_dtype()

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        file_name = self._file_name(name)
        try:
            return self._files[self._shard_of[file_name]].get_tensor(file_name).to(dtype)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.path / self._shard_of[file_name]}: {file_name} cannot be read: {error}") from None

    def packed(self, name: str) -> PackedBlocks | None:
        self._file_name(name)
        return None

    def tokenizer(self) -> Tokenizer:
        from kvshare.checkpoints.tokenizer import tokenizer_from_directory

        return tokenizer_from_directory(self.path, self.config, self.generation_config)

    def check_plain(self) -> None:
        """Refuse 8 and 4 bit floats, which mean nothing without their scales. Raises `CheckpointError`."""
        odd = {self.dtype(name) for name in self._file_names} - PLAIN_DTYPES
        if odd:
            raise CheckpointError(
                f"{self.origin}: holds {', '.join(sorted(odd))} tensors, "
                "but config.json has no quantization_config that says how to read them"
            )

    def _file_name(self, name: str) -> str:
        try:
            return self._file_names[name]
        except KeyError:
            raise CheckpointError(f"{self.origin}: no tensor {name!r} among the {len(self._file_names)} of the language model") from None

    def _slice(self, name: str) -> Any:
        file_name = self._file_name(name)
        return self._files[self._shard_of[file_name]].get_slice(file_name)

    def _check_index(self) -> None:
        for file, shard in self._files.items():
            held = set(shard.keys())
            missing = [name for name, home in self._shard_of.items() if home == file and name not in held]
            if missing:
                raise CheckpointError(
                    f"{self.path / file}: the index says that it holds {missing[0]!r} (and {len(missing) - 1} more), but it does not"
                )


def _open(path: Path) -> Any:
    """The file with its header checked (shape times dtype is the bytes, offsets follow each other and end at the file's end)."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is named by the index but does not exist: the download is incomplete") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no sound safetensors file ({path.stat().st_size} bytes): {error}. Download it again") from None


def _shards(path: Path) -> dict[str, str]:
    """Which file each tensor is in, from the index or from the only file there is."""
    if (path / _INDEX).exists():
        weight_map = read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / _INDEX}: has no weight_map that says which file holds which tensor")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{path / _INDEX}: {file!r} is not the name of a file beside it")
        return weight_map
    files = [path / _SINGLE] if (path / _SINGLE).exists() else sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return dict.fromkeys(_open(files[0]).keys(), files[0].name)
    if files:
        raise CheckpointError(f"{path}: {len(files)} safetensors files but no {_INDEX} that says which belong together")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path}: only pickled weights ({pickles[0]}), which can run code when they are read and are refused. "
            "Take a revision with safetensors, or convert them in a throw-away machine with safetensors.torch.save_file"
        )
    raise CheckpointError(f"{path}: no {_SINGLE}, no {_INDEX} and no GGUF file")

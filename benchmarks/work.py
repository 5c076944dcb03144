"""What other engines must read and compute: from the files that they load, and kvshare's count of the model."""

from __future__ import annotations

from pathlib import Path

import torch

from kvshare.benchmark.work import WeightBytes, prompt_flops, step_bytes, weight_bytes
from kvshare.checkpoints.gguf_header import read_header
from kvshare.layout import layout_from_config
from kvshare.models import build_model
from kvshare.planner.models import resolve


class Work:
    """The least that a model in `file` must do, whichever engine runs it."""

    def __init__(self, file: Path):
        config = resolve(str(file)).config
        model = build_model(config, torch.bfloat16)
        self._layout, self._model, self._config = layout_from_config(config), model, config
        self._weights = gguf_weights(file) if file.suffix == ".gguf" else weight_bytes(model)

    def of(self, context: int, batch: int, decode: int) -> dict[str, int | None]:
        """For `decode` tokens behind each prompt, with a cache of 16-bit numbers."""
        read = None if self._weights is None else step_bytes(self._weights, self._layout, context + decode // 2, batch, "bf16")
        flops = prompt_flops(self._model, self._config, context)
        return {"step_bytes": read, **(flops._asdict() if flops else {})}


def gguf_weights(file: Path) -> WeightBytes:
    """What a decode step reads of the file: of a per-layer table, and of an embedding beside a head, a row for each token."""
    tensors = read_header(file).tensors
    tables = {"per_layer_token_embd.weight"} | ({"token_embd.weight"} if "output.weight" in tensors else set())
    rows = sum(info.num_bytes // info.shape[0] for name, info in tensors.items() if name in tables)
    return WeightBytes(sum(info.num_bytes for name, info in tensors.items() if name not in tables), rows)

"""What other engines must read and compute: from the files that they load, and kvshare's count of the model."""

from __future__ import annotations

from pathlib import Path

import torch

from kvshare.benchmark.work import prompt_flops, step_bytes, weight_bytes
from kvshare.checkpoints.gguf_header import read_header
from kvshare.layout import layout_from_config
from kvshare.models import build_model
from kvshare.planner.models import resolve


class Work:
    """The least that a model in `file` must do, whichever engine runs it."""

    def __init__(self, file: Path):
        config = resolve(str(file)).config
        model = build_model(config, torch.bfloat16)
        self.layout, self._model, self._config = layout_from_config(config), model, config
        self.weights = gguf_bytes(file) if file.suffix == ".gguf" else weight_bytes(model)

    def step_bytes(self, context: int, batch: int) -> int | None:
        """Of a decode step with a cache of 16-bit numbers."""
        return None if self.weights is None else step_bytes(self.weights, self.layout, context, batch, "bf16")

    def prompt_flops(self, context: int) -> int | None:
        return prompt_flops(self._model, self._config, context)


def gguf_bytes(file: Path) -> int:
    """Bytes of the tensors that a decode step reads whole: no per-layer table, and no embedding beside a head."""
    tensors = read_header(file).tensors
    rows_only = {"per_layer_token_embd.weight"} | ({"token_embd.weight"} if "output.weight" in tensors else set())
    return sum(info.num_bytes for name, info in tensors.items() if name not in rows_only)

"""Checkpoints whose safetensors hold quantized numbers: one reader for each `quant_method`, and a refusal for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvshare.checkpoints.deepseek_quantized import open_block_scaled
from kvshare.errors import CheckpointError

if TYPE_CHECKING:
    from kvshare.checkpoints.checkpoint import Checkpoint
    from kvshare.checkpoints.safetensors_dir import SafetensorsDirectory

Reader = Callable[["SafetensorsDirectory", Mapping[str, Any]], "Checkpoint"]
"""Wraps the files as they are, with the config's `quantization_config`, in a checkpoint whose `get` gives plain numbers."""

READERS: Mapping[str, Reader] = {"fp8": open_block_scaled}
"""Readers by `quant_method`; what is not here is refused."""

LOADABLE = "safetensors in fp32, fp16 and bf16; GGUF in F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K and Q6_K"

PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})
"""Safetensors dtypes that are what they say; the others (8 and 4 bit floats, scales) mean nothing without a reader."""


def open_quantized(checkpoint: SafetensorsDirectory, quantization: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint behind the reader for its `quant_method`. Raises `CheckpointError` with the list of what loads where there is none."""
    method = str(quantization.get("quant_method") or "unnamed")
    form = quantization.get("format")
    if method not in READERS:
        known = "".join(f"; quantized with {name}" for name in sorted(READERS))
        raise CheckpointError(
            f"{checkpoint.origin}: quantization {method!r}{f' ({form})' if form else ''} does not load. What loads: {LOADABLE}{known}. "
            "Look for an unquantized or a GGUF version of this model"
        )
    return READERS[method](checkpoint, quantization)

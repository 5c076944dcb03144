"""What quantized weights and an encoded cache cost: predictions beside those of the same model with plain weights and an exact cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.weights import load_weights
from kvshare.doctor.comparison import DIVERGENCE_BOUND, compare
from kvshare.doctor.report import Check
from kvshare.doctor.running import Ways, one_shot
from kvshare.engine.llm import free_memory
from kvshare.kernels.quantized_weight import ROWS_IN_BLOCKS, ActivationWidth
from kvshare.layout import CacheLayout, PrecisionChoice
from kvshare.layout.precision import describe_precision
from kvshare.layout.rows import NATIVE
from kvshare.models import build_model
from kvshare.models.model import Model

WEIGHTS_BOUND = {"int8": 0.02, "int4": 1.0}
"""Mean KL in nats a token. Bytes that are read wrongly give several nats. The rounding itself gives 0.002 in 8 bits; in 4 bits 0.4 in a
model of 135M parameters, and less in larger ones."""

ACTIVATIONS_BOUND = 0.05
"""The same for activations in 8 bits, which give 0.003 to 0.015 in models of 135M and 270M parameters."""

CACHE_BOUND = {9: 0.02, 8: 0.05, 4: 1.0, 3: 2.0, 2: 3.0}
"""The same by the bits of the coarsest owner: wide, because what a precision costs depends on the model. `kvshare tune` measures it."""

_SHARE_OF_ROUNDING = 0.05  # of `CACHE_BOUND`: matrix products that round differently now and then choose another code of a row

_ROOM = 0.6  # of the free memory that plain weights may fill


def is_lossy(layout: CacheLayout, precision: PrecisionChoice) -> bool:
    """Whether any owner's rows are rounded when they are stored."""
    found = [layout.precision_of(owner, precision) for owner in layout.owners]
    return any(each.bits < 16 or each.name == NATIVE for each in found)


def weights_check(
    model: Model, path: Path, ids: Sequence[int], hidden: Tensor, dtype: torch.dtype, kv_layout: str, weights: str
) -> Check:  # hidden [tokens, hidden]
    """`model`'s predictions behind `hidden`, without an encoded cache, against those of the plain weights in `dtype`."""
    kind = weights if weights in WEIGHTS_BOUND else "the file's"
    name, dtype_name = f"{kind} blocks, as plain", str(dtype).removeprefix("torch.")
    checkpoint = open_checkpoint(path)
    needed = sum(torch.Size(checkpoint.shape(each)).numel() for each in checkpoint.names()) * dtype.itemsize
    free = free_memory()
    if needed > _ROOM * free:
        return Check(name, dtype_name, "not compared", f"plain weights take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    plain = build_model(checkpoint.config, dtype, kv_layout).eval()
    load_weights(plain, checkpoint, dtype)
    bound = WEIGHTS_BOUND.get(weights, DIVERGENCE_BOUND.get(dtype_name, 1e-2))
    return compare(plain.logits, one_shot(plain, ids), hidden, model.logits).loss(name, dtype_name, bound)


def activations_check(ways: Ways, dtype: str) -> Check:
    """Predictions with activations rounded wherever they are, in chunks that meet blocks, against one step that rounds few of them."""
    hidden = ways.watch().run(ways.ids, [len(part) for part in torch.tensor(ways.ids).split(ROWS_IN_BLOCKS)])

    def logits(rows: Tensor) -> Tensor:  # [rows, hidden] -> [rows, vocab]
        return torch.cat([ways.model.logits(part) for part in rows.split(ROWS_IN_BLOCKS)])

    return compare(ways.model.logits, ways.reference, hidden, logits).loss("int8 activations, as exact", dtype, ACTIVATIONS_BOUND)


def ways_bound(layout: CacheLayout, precision: PrecisionChoice, dtype: str, activations: ActivationWidth) -> float:
    """The mean divergence that two ways of running may have from each other, where they read rows in `precision`.

    In steps of many tokens activations are not rounded.
    """
    least = max(DIVERGENCE_BOUND.get(dtype, 0.0), ACTIVATIONS_BOUND if activations == "int8" else 0.0)
    return max(least, _SHARE_OF_ROUNDING * _cache_bound(layout, precision)) if is_lossy(layout, precision) else least


def _cache_bound(layout: CacheLayout, precision: PrecisionChoice) -> float:
    coarsest = min(layout.precision_of(owner, precision).bits for owner in layout.owners)
    return CACHE_BOUND.get(coarsest, CACHE_BOUND[8])


def cache_check(model: Model, exact: Tensor, found: Tensor, precision: PrecisionChoice, dtype: str) -> Check:  # 2 x [tokens, hidden]
    """Predictions with rows in `precision` against those with exact rows."""
    name = f"{describe_precision(precision, model.layout)} cache, as exact"
    return compare(model.logits, exact, found).loss(name, dtype, _cache_bound(model.layout, precision))

"""Products of a plain bfloat16 weight with few rows: limited by memory, where the native kernel reads faster than torch's product."""

from __future__ import annotations

import torch
from torch import Tensor

from kvshare import kernels
from kvshare.kernels.quantized_weight import QuantizedWeight

FEW_ROWS = 32  # with more, torch's product is as fast


class FewRowsProduct:
    """Binds a weight to the kernels when it is first needed, and again when it has moved."""

    def __init__(self) -> None:
        self._place: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None
        self._bound: QuantizedWeight | None = None

    def of(
        self,
        weight: Tensor,  # [out_features, in_features]
        x: Tensor,  # [..., in_features]
        most: int = FEW_ROWS,
    ) -> QuantizedWeight | None:
        """What multiplies `x` natively; None where torch does: more than `most` rows, another type or device, gradients, no kernels."""
        if x.numel() > most * x.shape[-1] or torch.is_grad_enabled() or weight.dtype != torch.bfloat16:
            return None
        if not kernels.available():
            return None
        place = weight.data_ptr(), weight.shape, weight.stride()
        if place != self._place:
            self._place = place
            usable = weight.device.type == "cpu" and weight.is_contiguous()
            self._bound = QuantizedWeight((weight.detach(),)) if usable else None
        return self._bound

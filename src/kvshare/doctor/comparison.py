"""Are two sets of logits the same? In float32 by their difference, in 16 bits by the tokens that they choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvshare.doctor.report import Check

HEAD_ROWS = 64  # rows of logits that exist at once

FLOAT32_BOUND = 1e-4
"""Largest difference of two logits, as a share of the largest logit: rounding in another order, through all layers."""

TIE_BOUND = {"bfloat16": 2.0**-5, "float16": 2.0**-8}
"""Two tokens whose logits differ by less than this share of the largest logit may swap places: a few units in the last place of the dtype,
which deep models amplify."""

DIVERGENCE_BOUND = {"bfloat16": 1e-2, "float16": 1e-3}
"""Mean KL divergence in nats a token."""


@dataclass(slots=True)
class Difference:
    """How far logits are from a reference, gathered over rows."""

    rows: int = 0
    largest_logit: float = 0.0
    absolute: float = 0.0  # the largest difference of two logits
    other_tokens: int = 0  # rows whose most probable token differs
    margin: float = 0.0  # the most by which the reference prefers its own token in such a row
    divergence: float = 0.0  # KL from the reference, summed over rows
    finite: bool = True

    def add(self, reference: Tensor, found: Tensor) -> None:  # [rows, vocab] each
        reference, found = reference.float(), found.float()
        self.rows += len(reference)
        self.finite &= bool(torch.isfinite(found).all())
        self.largest_logit = max(self.largest_logit, reference.abs().max().item())
        self.absolute = max(self.absolute, (found - reference).abs().max().item())
        best, chosen = reference.argmax(-1, keepdim=True), found.argmax(-1, keepdim=True)
        self.other_tokens += int((best != chosen).sum())
        self.margin = max(self.margin, (reference.gather(1, best) - reference.gather(1, chosen)).max().item())
        log_p, log_q = torch.log_softmax(reference, -1), torch.log_softmax(found, -1)
        self.divergence += (log_p.exp() * (log_p - log_q)).sum().item()

    def check(self, name: str, dtype: str, remark: str = "", most: float | None = None) -> Check:
        """The verdict. float32 is held to `FLOAT32_BOUND`; 16-bit types to equal tokens or near ties, and to a divergence.

        `most` is the divergence, if not the dtype's own.
        """
        scale, mean = max(self.largest_logit, 1e-30), self.divergence / max(1, self.rows)
        remark = f"; {remark}" if remark else ""
        if not self.finite:
            return Check(
                name, dtype, "failed", "logits are not finite numbers: a row was read that nobody had written, or a value overflowed"
            )
        if dtype == "float32":
            share = self.absolute / scale
            detail = f"logits within {self.absolute:.1e} (bound {FLOAT32_BOUND * scale:.1e}) in {self.rows:,} rows{remark}"
            return Check(name, dtype, "passed" if share <= FLOAT32_BOUND else "failed", detail, share, FLOAT32_BOUND)
        share, bound, most = self.margin / scale, TIE_BOUND[dtype], most or DIVERGENCE_BOUND[dtype]
        detail = f"{self.rows - self.other_tokens:,} of {self.rows:,} tokens equal"
        if self.other_tokens:
            detail += f", the others by a margin of {self.margin:.2g} (bound {bound * scale:.2g})"
        detail += f"; KL {mean:.1e} (bound {most:.0e}){remark}"
        return Check(name, dtype, "passed" if share <= bound and mean <= most else "failed", detail, share, bound)

    def loss(self, name: str, dtype: str, bound: float) -> Check:
        """The verdict on something that rounds on purpose: its mean divergence in nats a token, against `bound`."""
        mean, equal = self.divergence / max(1, self.rows), self.rows - self.other_tokens
        detail = f"KL {mean:.1e} (bound {bound:g}), {equal:,} of {self.rows:,} tokens equal"
        return Check(name, dtype, "passed" if self.finite and mean <= bound else "failed", detail, mean, bound)


Head = Callable[[Tensor], Tensor]
"""Hidden states [rows, hidden] -> logits [rows, vocab]."""


def compare(head: Head, reference: Tensor, found: Tensor, found_head: Head | None = None) -> Difference:
    """The difference between the logits of hidden states [rows, hidden], a slice at a time; `found` goes through `found_head` if given."""
    difference = Difference()
    with torch.inference_mode():
        for start in range(0, len(reference), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            difference.add(head(reference[part]), (found_head or head)(found[part]))
    return difference

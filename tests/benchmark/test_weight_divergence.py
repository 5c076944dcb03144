"""Weights that lay on a grid of blocks no longer do, and have moved by no more than half a step."""

from __future__ import annotations

import torch

from benchmarks.weight_divergence import dithered


def test_each_number_moves_within_its_step() -> None:
    codes = torch.randint(0, 16, (64, 96), generator=torch.Generator().manual_seed(1)).float()
    codes[:, 0], codes[:, 32:34], codes[:, 64:66] = 3.0, torch.tensor([7.0, 8.0]), torch.tensor([1.0, 2.0])
    codes[:, 1] = 4.0  # neighbours on the grid in every group
    steps = torch.rand(64, 3, generator=torch.Generator().manual_seed(2)).repeat_interleave(32, 1) + 0.1
    moved = (dithered(codes * steps) - codes * steps) / steps
    assert moved.abs().max() <= 0.5 + 1e-3
    assert moved.abs().mean() > 0.2

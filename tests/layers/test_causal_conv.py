"""The two-stage convolution over a ragged batch equals torch's, sequence by sequence and chunk by chunk."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kvshare.layers.causal_conv import CausalWindows, TwoStageConv, depthwise_weight, grouped_bias, grouped_weight

GROUPS, WIDTH = 3, 4


@pytest.mark.parametrize(("depthwise", "grouped"), [(2, 2), (4, 3), (1, 2), (3, 1)])
def test_ragged_steps_equal_whole_sequences(depthwise: int, grouped: int) -> None:
    generator = torch.Generator().manual_seed(0)
    channels, taps = GROUPS * WIDTH, depthwise + grouped - 2
    first, second = torch.randn(channels, 1, depthwise, generator=generator), torch.randn(channels, WIDTH, grouped, generator=generator)
    biases = torch.randn(2, channels, generator=generator)
    conv = TwoStageConv(GROUPS, WIDTH, depthwise, grouped)
    conv.load_state_dict(
        {
            "depthwise": depthwise_weight([first]),
            "depthwise_bias": biases[0],
            "grouped": grouped_weight([second]),
            "grouped_bias": grouped_bias([biases[1]], WIDTH),
        }
    )
    sequences = [torch.randn(9, channels, generator=generator) for _ in range(3)]
    expected = []
    for rows in sequences:
        padded = F.pad(rows.t()[None], (taps, 0))
        mixed = F.conv1d(F.conv1d(padded, first, biases[0], groups=channels), second, biases[1], groups=GROUPS)
        expected.append(mixed[0].t().unflatten(-1, (GROUPS, WIDTH)))

    tails, done = torch.zeros(3, taps, channels), [0, 0, 0]
    for counts in ((1, 0, 4), (1, 5, 0), (6, 1, 1), (1, 3, 4)):  # some shorter than the tail, some with nothing at all
        new = [rows[start : start + count] for rows, start, count in zip(sequences, done, counts, strict=True)]
        windows, tails = CausalWindows.of(counts, taps).gather(torch.cat(new), tails)
        wanted = [rows[start : start + count] for rows, start, count in zip(expected, done, counts, strict=True)]
        torch.testing.assert_close(conv(windows), torch.cat(wanted), atol=1e-5, rtol=1e-5)
        done = [start + count for start, count in zip(done, counts, strict=True)]
    assert done == [9, 9, 9]

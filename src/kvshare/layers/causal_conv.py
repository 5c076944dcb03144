"""Causal convolution over a flat batch of several sequences, some inside their prompt, some a token long: no loop over sequences.

Each sequence brings its tail, the last rows that it saw before this step (zeros at its start), and leaves with its new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class CausalWindows:
    """Where each token's predecessors lie. Rows are numbered through the batch [tokens], then through the tails [sequences * taps].

    The same for every layer of a step: build it once, with `of`.
    """

    rows: Tensor  # [tokens, taps + 1], oldest first; the last is the token itself
    tails: Tensor  # [sequences, taps]: the last rows of each sequence after the step

    @staticmethod
    def of(counts: Sequence[int], taps: int, device: torch.device | str = "cpu") -> CausalWindows:
        """Windows of a batch in which sequence s has `counts[s]` new tokens (also none), one sequence behind the other."""
        lengths = torch.tensor(counts, device=device)
        starts = lengths.cumsum(0) - lengths
        tokens, sequences = sum(counts), torch.arange(len(counts), device=device)
        of_token = sequences.repeat_interleave(lengths)  # [tokens]
        places = torch.arange(tokens, device=device) - starts[of_token]  # [tokens], from the first new token of the sequence on
        back = torch.arange(taps, -1, -1, device=device)

        def numbered(sequence: Tensor, place: Tensor) -> Tensor:  # places in front of 0 lie in the sequence's tail
            return torch.where(place >= 0, starts[sequence, None] + place, tokens + sequence[:, None] * taps + taps + place)

        return CausalWindows(numbered(of_token, places[:, None] - back), numbered(sequences, lengths[:, None] - back[:-1]))

    def gather(self, x: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:  # [tokens, channels], [sequences, taps, channels]
        """Each token behind its predecessors [tokens, taps + 1, channels], and the tails after the step [sequences, taps, channels]."""
        every = torch.cat([x, tails.to(x.dtype).flatten(0, 1)])
        return every[self.rows], every[self.tails]


class TwoStageConv(nn.Module):
    """A depthwise convolution over time, then one that mixes the channels of each group, with nothing between them.

    The second stage is one matrix product a group over `grouped_taps * group_width` numbers.
    """

    def __init__(self, groups: int, group_width: int, depthwise_taps: int, grouped_taps: int):
        super().__init__()
        channels = groups * group_width
        self.groups, self.grouped_taps = groups, grouped_taps
        self.depthwise = nn.Parameter(torch.empty(depthwise_taps, channels))  # oldest tap first
        self.depthwise_bias = nn.Parameter(torch.empty(channels))
        self.grouped = nn.Parameter(torch.empty(groups, grouped_taps * group_width, group_width))  # [groups, taps * inputs, outputs]
        self.grouped_bias = nn.Parameter(torch.empty(groups, 1, group_width))

    def forward(self, windows: Tensor) -> Tensor:  # [tokens, depthwise taps + grouped taps - 1, channels] -> [tokens, groups, group_width]
        span = self.grouped_taps
        first = self.depthwise_bias + sum(windows[:, tap : tap + span] * weight for tap, weight in enumerate(self.depthwise))
        inputs = first.unflatten(-1, (self.groups, -1)).permute(2, 0, 1, 3).flatten(2)  # [groups, tokens, taps * group_width]
        return torch.baddbmm(self.grouped_bias, inputs, self.grouped).transpose(0, 1)


def depthwise_weight(parts: list[Tensor]) -> Tensor:  # torch's [channels, 1, taps] -> [taps, channels]
    return parts[0].squeeze(1).t().contiguous()


def grouped_weight(parts: list[Tensor]) -> Tensor:  # torch's [groups * outputs, inputs, taps] -> [groups, taps * inputs, outputs]
    """A group is as wide as its inputs are many."""
    weight = parts[0]
    return weight.unflatten(0, (-1, weight.shape[1])).permute(0, 3, 2, 1).flatten(1, 2).contiguous()


def grouped_bias(parts: list[Tensor], group_width: int) -> Tensor:  # [channels] -> [groups, 1, group_width]
    return parts[0].unflatten(0, (-1, 1, group_width))

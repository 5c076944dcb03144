"""DeepSeek V4's compressor: one row for each block of `ratio` tokens, pooled per channel by a softmax over learned gates.

    HCA:  entry_i = RMSNorm( sum_j softmax_j(Z_j) * C_j ),  j over the tokens of block i
    CSA:  the same over 2 * ratio slots: Ca of the tokens of block i - 1, and Cb of those of block i

C = W_kv x and Z = W_gate x + ape[place in the block]. CSA's projections are twice as wide and hold Ca and Cb side by side.
Entries are rotated at their block's first position.

What is cached between steps (float32): C and Z of the block that is not complete, and for CSA also of the block before it.
Nothing is recomputed, so a step may add one token, or finish several blocks, of any number of sequences at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvshare.cache.step import Step
from kvshare.kernels import recurrent
from kvshare.layers.norm import RMSNorm
from kvshare.layers.rotary import Frequencies, Rotation


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which rows a step's entries pool, for one ratio: the same in every layer of that ratio, so found once a step.

    The rows meant are: the cached states of all sequences, then the step's new tokens, then one row that stands for nothing.
    """

    slots: Tensor  # [entries, slots]
    kept: Tensor  # [sequences * state rows], which rows are the states behind the step
    places: Tensor  # [tokens], each token's place in its block
    rotation: Rotation  # of the entries: their blocks' first positions

    @staticmethod
    def of(step: Step, ratio: int, overlap: bool, frequencies: Frequencies) -> Blocks:
        """The blocks that the tokens of `step` complete. With `overlap` an entry also pools the block before its own."""
        lead = ratio if overlap else 0  # rows of a state that are the block before the open one
        state_rows, num_states = lead + ratio, (lead + ratio) * len(step.past)
        nothing = num_states + len(step.positions)
        slots, kept, starts = [], [], []
        for sequence, (past, span) in enumerate(zip(step.past, step.spans, strict=True)):
            first, num_open = sequence * state_rows, past % ratio
            before = torch.arange(first, first + lead) if past >= ratio else torch.full((lead,), nothing)
            unfinished = torch.arange(first + lead, first + lead + num_open)
            line = torch.cat([before, unfinished, torch.arange(num_states + span.start, num_states + span.end)])
            count = (num_open + span.count) // ratio
            if count:
                slots.append(line.unfold(0, state_rows, ratio)[:count])
                starts.append(torch.arange(count) * ratio + past - num_open)
            rest = line[count * ratio :]
            kept.append(torch.cat([rest, torch.full((state_rows - len(rest),), nothing)]))
        device = step.positions.device
        positions = torch.cat(starts) if starts else torch.empty(0, dtype=torch.long)
        return Blocks(
            (torch.cat(slots) if slots else torch.empty(0, state_rows, dtype=torch.long)).to(device),
            torch.cat(kept).to(device),
            step.positions % ratio,
            frequencies.at(positions.to(device), torch.float32),
        )


@dataclass(frozen=True, slots=True)
class OpenBlocks:
    """What kernels need to know in a step of one token a sequence, whatever blocks these complete."""

    rotation: Rotation  # at the first position of each token's block

    @staticmethod
    def of(step: Step, ratio: int, frequencies: Frequencies) -> OpenBlocks:
        return OpenBlocks(frequencies.at(recurrent.block_starts(step.positions, ratio), torch.float32))


class Compressor(nn.Module):
    """Pools the projections of tokens into entries of `width` numbers. `states` names what it keeps: `{states}_kv` and `{states}_gate`."""

    def __init__(self, width: int, ratio: int, overlap: bool, eps: float, layer: int, states: str):
        super().__init__()
        self.width, self.overlap, self.layer, self.states = width, overlap, layer, states
        self.projected = 2 * width if overlap else width  # width of C, and of Z
        self.ape = nn.Parameter(torch.empty(ratio, self.projected))  # [ratio, projected]
        self.norm = RMSNorm(width, eps)

    def forward(
        self,
        kv: Tensor,  # [tokens, projected]
        gate: Tensor,
        blocks: Blocks | OpenBlocks,
        step: Step,
    ) -> Tensor:  # [entries, 1, width]
        """The entries that the step completes, of all sequences, rotated; with `OpenBlocks` one for each token.

        Those of tokens that complete none are zeros. Reads and replaces the cached states; call once a step.
        """
        if isinstance(blocks, OpenBlocks):
            return self._stepped(kv, gate, blocks, step)
        old_kv, old_gate = step.state(self.layer, f"{self.states}_kv"), step.state(self.layer, f"{self.states}_gate")
        precise = torch.promote_types(kv.dtype, torch.float32)
        nothing = kv.new_zeros(1, self.projected, dtype=precise)
        c = torch.cat([old_kv.flatten(0, 1).to(precise), kv.to(precise), nothing])
        z = torch.cat([old_gate.flatten(0, 1).to(precise), gate.to(precise) + self.ape[blocks.places], nothing - torch.inf])
        step.replace_state(self.layer, f"{self.states}_kv", c[blocks.kept].view_as(old_kv))
        step.replace_state(self.layer, f"{self.states}_gate", z[blocks.kept].view_as(old_gate))
        if not len(blocks.slots):
            return kv.new_empty(0, 1, self.width)
        pooled = (self._pooled(z, blocks).softmax(dim=1) * self._pooled(c, blocks)).sum(dim=1)  # [entries, width]
        return blocks.rotation.interleaved(self.norm(pooled.to(kv.dtype))[:, None])

    def _stepped(self, kv: Tensor, gate: Tensor, blocks: OpenBlocks, step: Step) -> Tensor:
        states = step.state_in_place(self.layer, f"{self.states}_kv"), step.state_in_place(self.layer, f"{self.states}_gate")
        if states[0] is None or states[1] is None:
            raise RuntimeError("open blocks are changed in place only in steps of one token a sequence")
        cos, sin = blocks.rotation
        return recurrent.compressed(kv, gate, (states[0], states[1]), self.ape, self.norm.spelled(), cos, sin, overlap=self.overlap)

    def _pooled(self, rows: Tensor, blocks: Blocks) -> Tensor:  # [rows, projected] -> [entries, slots, width]
        if not self.overlap:
            return rows[blocks.slots]
        before, own = blocks.slots.chunk(2, dim=1)  # Ca of the block before, Cb of the block itself
        return torch.cat([rows[:, : self.width][before], rows[:, self.width :][own]], dim=1)

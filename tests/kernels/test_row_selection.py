"""An indexer's choice over pages equals plain torch's wherever scores are apart, in every instruction set."""

from __future__ import annotations

from array import array

import pytest
import torch
from torch import Tensor

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.codecs import codec_for
from kvshare.cache.tables import PageTable
from kvshare.kernels.row_kind import row_kind
from kvshare.kernels.row_selection import RowSelection, SelectionSpan
from kvshare.layers.indexer import best_rows, index_scores
from kvshare.layout import Stream
from kvshare.layout.rows import BlockRow, precision_named

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

BOUND = 2.0**-18  # of scores of size 1


class Case:
    """Keys of several sequences in an arena whose other bytes are NaN, their pages in random order."""

    def __init__(self, positions: list[range], heads: int, width: int, top_k: int, precision: str = "bf16", per_row: int = 4):
        generator = torch.Generator().manual_seed(heads + width)
        self.stream = Stream("index", 1, width, per_row, native=BlockRow(4, 32))
        self.top_k, form = top_k, precision_named(precision)
        codec, row_bytes = codec_for(form, self.stream), self.stream.row_bytes(form)
        kind = row_kind(codec)
        assert kind is not None
        self.arena = Arena(400, 4096)
        self.arena.pages.fill_(0xFF)
        free = torch.randperm(400, generator=generator).tolist()
        self.spans, self.keys, start = [], [], 0
        for places in positions:
            count = (places[-1] + 1) // per_row
            encoded = codec.encode(torch.randn(max(count, 1), 1, width, generator=generator).bfloat16())[:count]
            table = PageTable(0, self.stream, 4096 // row_bytes)
            table.pages = array("i", (free.pop() for _ in range(-(-len(encoded) // table.rows_per_page))))
            for row, each in enumerate(encoded):
                page, offset = divmod(row, table.rows_per_page)
                self.arena.rows(row_bytes)[table.pages[page], offset] = each
            self.keys.append(codec.decode(encoded, 1, width)[:, 0].float())
            self.spans.append(SelectionSpan(start, len(places), table))
            start += len(places)
        self.q = torch.randn(start, heads, width, generator=generator).bfloat16()
        self.weights = torch.randn(start, heads, generator=generator) * (heads * width) ** -0.5
        self.positions = torch.tensor([place for places in positions for place in places])
        self.kernel = RowSelection(self.arena, self.stream, kind)

    def run(self) -> Tensor:
        return self.kernel.select(self.q, self.weights, self.positions, self.spans, self.top_k)

    def check(self, bound: float = BOUND) -> None:
        """What was chosen is what the twin chooses, but for rows whose scores are within the bound of the last one's."""
        got = self.run()
        for (start, count, _), keys in zip(self.spans, self.keys, strict=True):
            scores = index_scores(self.q[start : start + count].float(), self.weights[start : start + count], keys)
            visible = (self.positions[start : start + count] + 1) // self.stream.tokens_per_row
            wanted = best_rows(scores, visible, self.top_k)
            for mine, others, score in zip(got[start : start + count], wanted, scores, strict=True):
                assert (mine >= 0).sum() == (others >= 0).sum()
                assert (mine[:-1][mine[1:] >= 0] < mine[1:][mine[1:] >= 0]).all()
                different = set(mine.tolist()) ^ set(others.tolist())
                last = score[others[others >= 0]].min() if (others >= 0).any() else 0
                assert all(abs(score[row] - last) < bound for row in different)


@pytest.mark.parametrize(("heads", "width"), [(64, 128), (4, 32), (20, 64), (80, 16), (1, 2), (33, 48)])
def test_choices_equal_torchs(heads: int, width: int, isa: str) -> None:
    """From the first token on, in the middle, single queries, more and fewer rows than are chosen, across slices, tiles and pages."""
    Case([range(30), range(2000, 2019), range(900, 901), range(5, 6), range(1)], heads, width, 20).check()


@pytest.mark.parametrize("precision", ["native", "int8", "fp8", "int4", "rot8"])
def test_encoded_keys(precision: str, isa: str) -> None:
    Case([range(1000, 1013), range(700, 701)], 16, 64, 50, precision).check(2.0**-5 if precision == "rot8" else 2.0**-8)


def test_equal_scores_go_to_the_earlier_row(isa: str) -> None:
    case = Case([range(800, 803)], 4, 32, 30)
    case.weights.zero_()
    assert (case.run() == torch.arange(30)).all()
    case.weights.fill_(-0.0)
    assert (case.run() == torch.arange(30)).all()


def test_neither_batch_nor_threads_nor_chunks_change_a_choice(isa: str) -> None:
    case = Case([range(40), range(2900, 2921), range(1500, 1501)], 8, 32, 64)
    together, before = case.run(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(case.run(), together)
    finally:
        torch.set_num_threads(before)
    for start, count, keys in case.spans:
        for query in range(start, start + count):
            alone = slice(query, query + 1)
            span = SelectionSpan(0, 1, keys)
            assert torch.equal(case.kernel.select(case.q[alone], case.weights[alone], case.positions[alone], [span], 64), together[alone])

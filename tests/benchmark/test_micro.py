"""What the benchmark of kernels measures is what an engine would run: its pages in its order, its rows in its forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import tiny_llama

from benchmarks.micro import Timed
from benchmarks.micro.attention import CHUNK, Pages, layout_of
from kvshare import LLM, SamplingParams, kernels
from kvshare.layers.attention import attention

pytestmark = pytest.mark.skipif(not kernels.available(), reason="measures native kernels")


@pytest.mark.parametrize("name", ["E2B full", "another"])
def test_the_kernel_attends_to_the_rows_that_torch_is_given(name: str) -> None:
    heads, width = (1, 512) if name == "E2B full" else (2, 64)
    pages = Pages(layout_of(name, heads, width), CHUNK + 90, "bf16")
    q = torch.randn(1, 2 * heads, width).bfloat16()
    attend = pages.attention(q)
    attend()
    k, v = pages.plain_rows()
    assert torch.allclose(attend.args[1].float(), attention(q, k, v, None, scale=0.05).float(), atol=2e-2)
    assert pages.read_bytes == 2 * (CHUNK + 90) * heads * width * 2


def test_pages_lie_in_the_order_of_an_engine(tmp_path: Path) -> None:
    rows = 2 * CHUNK + 40
    llm = LLM(tiny_llama(tmp_path, max_position_embeddings=4096), max_context=rows + 4, max_sequences=1, chunk=CHUNK, progress=False)
    request = llm.engine.add([5] * rows, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    sequence = llm.engine.requests[request].sequences[0]
    while not sequence.output.token_ids:
        llm.engine.step()
    owner = llm.layout.last_owner("full")
    held = [list(sequence.cache.tables[owner, name].pages) for name in ("k", "v")]
    assert [list(table.pages) for table in Pages(llm.layout, rows, "fp32").tables] == held


def test_one_thread_is_one_and_then_all_again() -> None:
    seen, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        timed = Timed()
        timed.alone(lambda: seen.append(torch.get_num_threads()), repeats=1)
        timed(lambda: seen.append(torch.get_num_threads()), repeats=1)
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 1, 2, 2]

"""Calls that run again do so with threads that stay together: what is computed does not change, and what fails leaves the rest usable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from kernels.test_experts import choices, experts_of
from kernels.test_paged_attention import Case
from kernels.test_quantized_weight import packed
from kernels.test_small_ops import norm_of
from kernels.twins import random
from torch import Tensor, nn

from kvshare import kernels
from kvshare.kernels.block_rows import decode_rows
from kvshare.kernels.interleaved_blocks import interleave
from kvshare.kernels.program import Program, record
from kvshare.kernels.quantized_weight import QuantizedWeight
from kvshare.kernels.scratch import Scratch
from kvshare.kernels.step_spans import StepSpans
from kvshare.layers.activations import swiglu
from kvshare.layers.hyper_connections import HyperConnection
from kvshare.layers.norm import add_then_norm

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

TIMES = 6  # that a piece of work comes in its program: a team is not opened for a few calls


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recorded(compute: Callable[[], Tensor], spans: StepSpans) -> tuple[Tensor, Program]:
    """What one thread computes without a team, and the program of it."""
    with threads(1):
        result, program = record(lambda: [compute() for _ in range(TIMES)][-1], spans, Scratch(256 << 20))
    assert isinstance(program, Program), program
    return result.clone(), program


def products(name: str, rows: int, width: int) -> tuple[Callable[[], Tensor], StepSpans]:
    count = 2048 * 1024 // width
    part = torch.randn(count, width).bfloat16() if name == "BF16" else interleave(packed(name, count + 5, width))
    weight, x = QuantizedWeight([part]), random(rows, width, dtype=torch.bfloat16)
    return lambda: weight.matmul(x, 3, count - 2, dtype=torch.float32), StepSpans([])


def small_operations() -> tuple[Callable[[], Tensor], StepSpans]:
    x, y = random(37, 1024, dtype=torch.bfloat16), random(37, 1024, dtype=torch.bfloat16, seed=1)
    norm = norm_of(1024, torch.bfloat16, 1.0)
    return lambda: swiglu(*add_then_norm(x, norm(y), norm, norm)), StepSpans([])


def streams() -> tuple[Callable[[], Tensor], StepSpans]:
    connection, norm, x = HyperConnection(512, 4, 20, 1e-6, 1e-6), norm_of(512, torch.float32, 0.0), random(5, 4, 512, dtype=torch.float32)
    for parameter in connection.parameters():
        nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        found = connection(x, norm)
        return found.expand(found.normed, x)

    return run, StepSpans([])


def experts() -> tuple[Callable[[], Tensor], StepSpans]:
    layer, x, (chosen, weights) = experts_of(swiglu), random(16, 96, dtype=torch.bfloat16), choices(16, 4)
    return lambda: layer(x, chosen, weights), StepSpans([])


def attention(dtype: torch.dtype, codec: str | None) -> tuple[Callable[[], Tensor], StepSpans]:
    case = Case((2, 4, 64, 64), [700, 1, 333], dtype, codecs=(codec, codec) if codec else None)
    spans = StepSpans(case.spans)

    def run() -> Tensor:
        out = torch.empty(case.q.shape, dtype=dtype)
        case.kernel.attend(case.q, out, spans, scale=case.scale)
        return out[:-1]

    return run, spans


def table_rows() -> tuple[Callable[[], Tensor], StepSpans]:
    table, rows = interleave(packed("Q4_0", 100, 512)), torch.arange(40) * 2
    return lambda: decode_rows(table, rows, torch.bfloat16), StepSpans([])


WORK: dict[str, Callable[[], tuple[Callable[[], Tensor], StepSpans]]] = {
    "one row": lambda: products("Q4_0", 1, 1536),
    "long rows": lambda: products("Q4_0", 1, 12288),
    "rounded together": lambda: products("Q4_K", 5, 4096),
    "bfloat16 weights": lambda: products("BF16", 2, 1024),
    "rows of a table": table_rows,
    "small operations": small_operations,
    "streams": streams,
    "experts": experts,
    "attention": lambda: attention(torch.float32, None),
    "attention to encoded rows": lambda: attention(torch.bfloat16, "rot4"),
}


@pytest.mark.parametrize("work", WORK)
def test_a_team_computes_what_one_thread_does(work: str, isa: str) -> None:
    with torch.inference_mode():
        compute, spans = WORK[work]()
        expected, program = recorded(compute, spans)
        for count in (1, 2, 3):
            with threads(count):
                program.run(spans).fill_(float("nan"))
                assert torch.equal(program.run(spans), expected), f"{count} threads"


def test_an_error_in_a_replay_leaves_the_team_usable() -> None:
    with torch.inference_mode(), threads(3):
        layer, x, (chosen, weights) = experts_of(swiglu), random(16, 96, dtype=torch.bfloat16), choices(16, 4)
        compute, spans = products("Q4_0", 1, 1536)

        def run() -> Tensor:
            compute()
            return layer(x, chosen, weights)

        expected, program = recorded(run, spans)
        for _ in range(3):
            kept, chosen[3, 2] = int(chosen[3, 2]), 99
            with pytest.raises(IndexError, match="expert 99"):
                program.run(spans)
            chosen[3, 2] = kept
            assert torch.equal(program.run(spans), expected)


def test_programs_run_side_by_side() -> None:
    """Each thread of Python leads a team of its own, and all of them have more members than the machine has processors."""
    made = []
    with torch.inference_mode():
        for work in ("one row", "attention", "small operations"):
            compute, spans = WORK[work]()
            made.append((*recorded(compute, spans), spans, compute))
    right: set[int] = set()  # what a thread throws is not seen here

    def run(index: int) -> None:
        expected, program, spans, _ = made[index]
        torch.set_num_threads(3)  # of OpenMP's, which each thread counts for itself
        with torch.inference_mode():
            if all(torch.equal(program.run(spans), expected) for _ in range(20)):
                right.add(index)

    with threads(3):
        runners = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(made))]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join(timeout=60)
            assert not runner.is_alive(), "a team waits for a member that never comes"
    assert right == set(range(len(made)))

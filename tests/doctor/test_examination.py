"""A doctor that cannot fail is no doctor: each property is broken on purpose, and its check fails (where that can be said, no other)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import tiny_llama
from torch import Tensor

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedStep
from kvshare.cache.step import Step
from kvshare.cache.tables import PageTable, SequenceCache
from kvshare.checkpoints.packages import PACKAGES
from kvshare.checkpoints.resolve import locate
from kvshare.doctor import Report, examine
from kvshare.doctor.comparison import Difference
from kvshare.errors import CheckpointError, RequestError
from kvshare.kernels.quantized_weight import ActivationWidth
from kvshare.layers.quantized_linear import QuantizedLinear
from kvshare.models.llama import Attention, Llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that transformers knows too."""
    return tiny_llama(tmp_path_factory.mktemp("plain"), kv_sharing=None, layer_types=None, sliding_window=None)


def failures(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.status == "failed"}


def wrap(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: around(original, self, *args, **kwargs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_model_passes_and_says_what_was_not_compared(tiny: Path, dtype: str) -> None:
    report = examine(tiny, dtype=dtype)
    assert report.passed, failures(report)
    assert {check.name: check.status for check in report.checks} == {
        "planned = allocated, boundaries": "passed",
        "in one step, from pages": "passed",
        "in chunks": "passed",
        "token by token": "passed",
        "ragged batch": "passed",
        "tail skipped": "passed",
        "no reader wrote": "passed",
        "planned = allocated, running": "passed",
        "engine: batch = alone": "passed",
        "engine: pages": "passed",
        "equals transformers": "not compared",
    }
    assert "kv_sharing" in report.checks[-1].detail


def test_a_model_that_transformers_knows_is_compared(plain: Path) -> None:
    report = examine(plain)
    assert report.passed
    assert (report.checks[-1].name, report.checks[-1].status) == ("equals transformers", "passed")


def test_served_dtype_and_float32_are_both_examined() -> None:
    report = examine("demo", num_tokens=80)
    assert report.passed
    assert {check.dtype for check in report.checks} == {"", "bfloat16", "float32"}
    assert report.perplexity is not None
    assert 50 < report.perplexity < 200


ROUNDED = [
    ("int4", "int16", None, "int4 blocks, as plain"),
    ("int4", "int8", None, "int8 activations, as exact"),
    ("auto", "int16", "int8", "int8 cache, as exact"),
    ("auto", "int16", "rot3", "rot3 cache, as exact"),
]


@pytest.mark.parametrize(("weights", "activations", "kv_dtype", "name"), ROUNDED)
def test_what_rounding_costs_is_a_check_of_its_own(
    weights: str, activations: ActivationWidth, kv_dtype: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights != "auto" and not kernels.available():
        pytest.skip(kernels.reason_unavailable())
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path))
    report = examine("demo", num_tokens=80, weights=weights, kv_dtype=kv_dtype, activations=activations)
    assert report.passed, failures(report)
    assert {check.dtype for check in report.checks} == {"", "bfloat16"}
    (found,) = [check for check in report.checks if check.name == name]
    assert found.measured is not None
    assert found.bound is not None
    assert 1e-5 < found.measured < found.bound


@pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.reason_unavailable()}")
def test_blocks_that_are_read_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, QuantizedLinear, "part", lambda part, self, x, start, end: -part(self, x, start, end))
    assert failures(examine("demo", num_tokens=40, weights="int8", weight_cache=False)) == {"int8 blocks, as plain"}


def test_rows_that_are_stored_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(append: Callable[..., None], self: PagedStep, layer: int, rows: dict[str, Tensor]) -> None:
        append(self, layer, {name: values.roll(1, -1) for name, values in rows.items()})

    wrap(monkeypatch, PagedStep, "append", turned)
    assert "int8 cache, as exact" in failures(examine("demo", num_tokens=40, kv_dtype="int8"))


def test_exact_logits_are_not_asked_of_rounded_weights() -> None:
    with pytest.raises(RequestError, match="leave dtype away"):
        examine("demo", dtype="float32", weights="int8")


def test_a_reader_that_writes_its_owners_pages_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_one_row(forward: Callable[..., Tensor], self: Attention, x: Tensor, q: Tensor | None, rotation: object, step: Step) -> Tensor:
        owner = step.layout.owner[self.index]
        if owner != self.index and isinstance(step, PagedStep):
            stream = step.layout.layers[owner].streams[0]
            newest = step.new_rows(stream, 0)[1] - 1
            step._write(owner, stream, 0, newest, torch.ones(1, stream.heads, stream.width))
        return forward(self, x, q, rotation, step)

    wrap(monkeypatch, Attention, "forward", write_one_row)
    report = examine(tiny)
    assert "no reader wrote" in failures(report)
    found = next(check for check in report.checks if check.name == "no reader wrote")
    assert "layers [2, 3]" in found.detail


def test_a_reader_that_appends_fails_the_examination(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(forward: Callable[..., Tensor], self: Attention, x: Tensor, q: Tensor | None, rotation: object, step: Step) -> Tensor:
        if step.layout.owner[self.index] != self.index:
            step.append(self.index, {"k": x, "v": x})
        return forward(self, x, q, rotation, step)

    wrap(monkeypatch, Attention, "forward", append)
    report = examine(tiny)
    assert failures(report) == {"runs to the end"}
    assert "never writes" in report.checks[-1].detail


def test_an_arena_that_hands_out_too_much_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, Arena, "allocate", lambda allocate, self, count: allocate(self, count + (count > 0))[:count])
    report = examine(tiny)
    assert {"planned = allocated, boundaries", "planned = allocated, running"} <= failures(report)


def test_a_page_kept_behind_its_window_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, PageTable, "drop_dead_pages", lambda drop, self, num_tokens: drop(self, num_tokens - 1))
    assert {"planned = allocated, boundaries", "planned = allocated, running"} <= failures(examine(tiny))


def test_pages_that_do_not_come_back_are_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_one(release: Callable[..., None], self: SequenceCache) -> None:
        for table in self.tables.values():
            del table.pages[:1]
        release(self)

    wrap(monkeypatch, SequenceCache, "release", keep_one)
    assert {"planned = allocated, boundaries", "planned = allocated, running", "engine: pages"} <= failures(examine(tiny))


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1.001), ("bfloat16", 1.5)], ids=["a thousandth in float32", "half as much again in bfloat16"]
)
def test_logits_that_depend_on_the_chunking_are_found(tiny: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, size: float) -> None:
    def stretch(forward: Callable[..., Tensor], self: Llama, tokens: Tensor, step: Step) -> Tensor:
        hidden = forward(self, tokens, step)
        return torch.cat([hidden[:, :1] * (size if len(tokens) == 1 else 1), hidden[:, 1:] / (size if len(tokens) == 1 else 1)], dim=1)

    wrap(monkeypatch, Llama, "forward", stretch)
    found = failures(examine(tiny, dtype=dtype))
    assert "token by token" in found
    assert "in one step, from pages" not in found


def test_logits_that_depend_on_the_batch_are_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mix(forward: Callable[..., Tensor], self: Llama, tokens: Tensor, step: Step) -> Tensor:
        hidden = forward(self, tokens, step)
        return hidden if len(step.spans) == 1 else hidden.roll(1, 1)

    wrap(monkeypatch, Llama, "forward", mix)
    assert failures(examine(tiny)) == {"ragged batch", "engine: batch = alone"}


def test_a_tail_at_wrong_positions_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_earlier(tail: Callable[..., Step], self: Step) -> Step:
        narrowed = tail(self)
        narrowed.spans = tuple(replace(span, first=span.first - 1, last=span.last - 1) for span in narrowed.spans)
        return narrowed

    wrap(monkeypatch, Step, "tail", one_earlier)
    assert failures(examine(tiny)) == {"tail skipped"}


def test_a_row_that_nobody_wrote_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_a_row(
        write: Callable[..., None], self: PagedStep, layer: int, stream: Any, sequence: int, first: int, values: Tensor
    ) -> None:
        if layer != 3 or len(values) == 1:
            write(self, layer, stream, sequence, first, values)
        else:
            write(self, layer, stream, sequence, first, values[:-1])

    monkeypatch.setattr(PagedStep, "_write_all", Step._write_all)  # one sequence after the other, as without kernels
    wrap(monkeypatch, PagedStep, "_write", forget_a_row)
    report = examine(tiny)
    assert "in chunks" in failures(report)
    assert "nobody had written" in next(check for check in report.checks if check.name == "in chunks").detail


def test_a_model_that_is_not_transformers_is_found(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, Llama, "logits", lambda logits, self, hidden: logits(self, hidden.roll(1, 1)))
    assert failures(examine(plain)) == {"equals transformers"}


def test_near_ties_pass_in_16_bits_and_wrong_tokens_do_not() -> None:
    reference = torch.tensor([[10.0, 9.9, -5.0, 0.0]])
    tie, wrong = Difference(), Difference()
    tie.add(reference, torch.tensor([[9.95, 9.96, -5.0, 0.0]]))
    wrong.add(reference, torch.tensor([[9.0, 9.9, -5.0, 11.0]]))
    assert (tie.other_tokens, wrong.other_tokens) == (1, 1)
    assert tie.check("", "bfloat16").status == "passed"
    assert tie.check("", "float32").status == "failed"
    assert wrong.check("", "bfloat16").status == "failed"


def test_equal_tokens_with_another_distribution_fail_in_16_bits() -> None:
    difference = Difference()
    difference.add(torch.tensor([[5.0, 4.0, 3.0]]), torch.tensor([[5.0, 1.0, 1.0]]))
    assert difference.other_tokens == 0
    assert difference.check("", "bfloat16").status == "failed"


def test_a_text_that_is_too_short_is_refused(tiny: Path) -> None:
    with pytest.raises(RequestError, match="from 16 to 5"):
        examine(tiny, text="short")
    with pytest.raises(RequestError, match="from 16 to 512"):
        examine(tiny, num_tokens=513)


@pytest.mark.demo
@pytest.mark.parametrize("name", PACKAGES)
def test_pretrained_weights_pass(name: str) -> None:
    try:
        locate(name)
    except CheckpointError as error:
        pytest.skip(str(error))
    report = examine(name)
    assert report.passed, [check for check in report.checks if check.status == "failed"]
    assert report.checks[-1].status == "passed"

"""A replayed step is the step itself, bit for bit; what could not be replayed is noticed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.tables import SequenceCache
from kvshare.checkpoints.block_encoding import block_type, encode_blocks
from kvshare.engine import decode_steps
from kvshare.engine.decode_steps import DecodeSteps
from kvshare.kernels import quantized_weight
from kvshare.layers.linear import Linear
from kvshare.layers.quantized_linear import QuantizedLinear
from kvshare.models.llama import Llama

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")


class Sequences:
    """Sequences of one model in one arena. Every step is made twice: appending the same rows again changes nothing."""

    def __init__(self, count: int, precision: str = "fp32", dtype: torch.dtype = torch.float32, model: Llama | None = None):
        self.model = (model or tiny.model()).to(dtype)
        self.precision = precision
        self.arena = Arena(60 * count, self.model.layout.page_bytes(precision))
        self.arena.pages.fill_(0xFF)
        self.cache = PagedCache(self.model.layout, precision)
        self.steps = DecodeSteps(self.model, self.cache)
        self.caches = [SequenceCache(self.model.layout, self.arena, precision) for _ in range(count)]
        self.generator = torch.Generator().manual_seed(count)
        for index, cache in enumerate(self.caches):
            self.prefill(cache, 1 + 5 * index)

    def prefill(self, cache: SequenceCache, length: int) -> None:
        cache.reserve(length)
        with torch.inference_mode():
            self.model(self.tokens(length), PagedStep(self.cache, [cache], [length]))
        cache.commit(length)

    def tokens(self, count: int) -> Tensor:
        return torch.randint(3, tiny.VOCAB, (count,), generator=self.generator)

    @torch.inference_mode()
    def step(self, caches: Sequence[SequenceCache] | None = None) -> None:
        """One token each; asserts that what the engine does equals the step itself."""
        caches = self.caches if caches is None else caches
        tokens = self.tokens(len(caches))
        for cache in caches:
            cache.reserve(1)
        found = torch.stack(list(self.steps.logits(tokens.tolist(), caches)))
        expected = self.model.logits(self.model(tokens, PagedStep(self.cache, caches, [1] * len(caches)))).float()
        for cache in caches:
            cache.commit(1)
        assert torch.equal(found, expected)

    def replays(self, count: int, num_native_runs: int | None = None, num_torch_operations: int | None = None) -> None:
        """Assert that steps of `count` sequences are replayed by now, in so many parts."""
        (program,) = (each.program for key, each in self.steps._recorded.items() if key.sequences == count and key.isa == kernels.isa())
        assert num_native_runs is None or program.num_native_runs == num_native_runs
        assert num_torch_operations is None or program.num_torch_operations == num_torch_operations


@pytest.mark.parametrize("precision", ["bf16", "int8", "rot4", "fp8"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_replay_equals_the_step(count: int, precision: str) -> None:
    """Across the window's edge and the ends of pages, with owners and readers of both kinds."""
    run = Sequences(count, precision, torch.bfloat16)
    for _ in range(40):
        run.step()
    assert run.steps.describe() == "decode steps replayed in 1 native call"
    run.replays(count, num_native_runs=1, num_torch_operations=0)


def test_replay_equals_the_step_between_products_of_torch() -> None:
    """float32 weights are multiplied by torch: those calls are replayed as well."""
    run = Sequences(3)
    for _ in range(12):
        run.step()
    run.replays(3)
    assert run.steps.describe().endswith(" operations of torch")


def test_sequences_may_change_places_fork_and_lose_their_pages() -> None:
    run = Sequences(4, "rot8", torch.bfloat16)
    for _ in range(3):
        run.step()
    for turn in range(12):
        run.step(run.caches[turn % 4 :] + run.caches[: turn % 4])
    run.replays(4)
    run.caches[1].release()
    run.caches[1] = run.caches[0].fork()
    for _ in range(20):
        run.step()
    run.caches[2].release()  # as the scheduler does with the youngest
    run.prefill(run.caches[2], 30)
    for _ in range(12):
        run.step()
    for cache in run.caches:
        cache.release()
    assert run.arena.num_free == run.arena.num_pages


def test_sizes_of_batches_share_their_temporaries() -> None:
    run, alone = Sequences(8, "bf16", torch.bfloat16), Sequences(8, "bf16", torch.bfloat16)
    for count in (1, 8, 2, 5, 1, 8, 2, 5, 1, 8, 2, 5):
        run.step(run.caches[:count])
    assert run.steps.num_programs == 4
    for _ in range(3):
        alone.step()
    assert run.steps._scratch is not None
    assert alone.steps._scratch is not None
    assert run.steps._scratch.peak_bytes == alone.steps._scratch.peak_bytes, "the largest batch alone decides what is taken"


def test_layers_share_their_temporaries() -> None:
    """What one layer has let go of the next one takes: the memory does not grow with depth."""
    run = Sequences(2, "bf16", torch.bfloat16)
    for _ in range(3):
        run.step()
    width, rows = tiny.CONFIG["intermediate_size"], 2
    assert isinstance(width, int)
    assert run.steps._scratch is not None
    assert run.steps._scratch.peak_bytes < 16 * rows * width * 4 + rows * tiny.VOCAB * 8


def test_only_so_many_programs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "MOST_PROGRAMS", 2)
    run = Sequences(4, "bf16", torch.bfloat16)
    for count in (1, 1, 2, 2, 1, 3, 3, 1, 2, 2, 4, 4, 1):
        run.step(run.caches[:count])
        assert run.steps.num_programs <= 2


def test_instruction_set_and_threads_may_change() -> None:
    run = Sequences(2, "int8", torch.bfloat16)
    before = torch.get_num_threads()
    try:
        for isa in (*kernels.native.ISAS, kernels.native.ISAS[0]):
            with kernels.use_isa(isa):
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    run.step()
                run.replays(2)
    finally:
        torch.set_num_threads(before)


RECORDS = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from engine.test_decode_steps import Sequences
run = Sequences(1, "bf16", torch.bfloat16)
for _ in range(3):
    run.step()
run.replays(1)
print("torch._dynamo" in sys.modules)
"""


def test_recording_does_not_import_a_compiler() -> None:
    """It would take a second of somebody's first answer."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    found = subprocess.run([sys.executable, "-c", RECORDS, *paths], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


class Changed(nn.Module):
    """A layer, and something that is done to what it gives."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x))


def test_what_torch_computes_between_kernels_is_computed_again() -> None:
    run = Sequences(3, "bf16", torch.bfloat16)
    run.model.blocks[1].mlp = Changed(run.model.blocks[1].mlp, lambda x: torch.softmax(x, -1).mul_(2) + x[[2, 0, 1]])  # pyright: ignore[reportAttributeAccessIssue]
    run.steps = DecodeSteps(run.model, run.cache)
    for _ in range(6):
        run.step()
    run.replays(3, num_native_runs=2)


def test_weights_decoded_for_many_rows_are_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel at a time, in memory of the recording's own."""
    monkeypatch.setattr(quantized_weight, "ROWS_IN_BLOCKS", 2)
    monkeypatch.setattr(quantized_weight, "PANEL_BYTES", 0)
    run = Sequences(3, "bf16", torch.bfloat16)
    for block in run.model.blocks:
        for name, linear in list(block.mlp.named_children()):  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(linear, Linear) and linear.weight.shape[1] % 32 == 0:
                packed = encode_blocks(linear.weight.detach(), block_type("int8", linear.weight.shape[1]))
                setattr(block.mlp, name, QuantizedLinear([packed]))
    run.steps = DecodeSteps(run.model, run.cache)
    for _ in range(4):
        run.step()
        others = run.model.blocks[0].mlp.gate_up  # pyright: ignore[reportAttributeAccessIssue]
        others(torch.zeros(9, others.weight.in_features, dtype=torch.bfloat16))  # in the memory that all other products use
    run.replays(3)
    assert not run.steps.reasons


def chosen_by_value(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "branch": (chosen_by_value, "depends on what tensors contain"),
    "number": (lambda x: x * x.max().item(), "depends on what tensors contain"),
    "list": (lambda x: x * x.abs().max()[None].tolist()[0], "tolist"),
    "mask": (lambda x: x + x[x > 0].sum(), "depends on what tensors contain"),
    "chance": (lambda x: x + 0 * torch.rand(x.shape, dtype=x.dtype), "depends on what tensors contain"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_computed_again_is_noticed(name: str) -> None:
    change, reason = CHANGES[name]
    run = Sequences(2, "bf16", torch.bfloat16)
    run.model.blocks[1].mlp = Changed(run.model.blocks[1].mlp, change)  # pyright: ignore[reportAttributeAccessIssue]
    run.steps = DecodeSteps(run.model, run.cache)
    for _ in range(5):
        run.step()
    assert not run.steps.num_programs
    assert all(reason in found for found in run.steps.reasons.values()), run.steps.reasons
    assert run.steps.reasons
    assert reason in run.steps.describe()


def test_a_model_that_asks_for_what_changes_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Sequences(2, "bf16", torch.bfloat16)
    forward = run.model.forward

    def scaled_by_length(tokens: Tensor, step: Any) -> Tensor:
        return forward(tokens, step) * (1 + max(step.past))

    monkeypatch.setattr(run.model, "forward", scaled_by_length)
    for _ in range(5):
        run.step()
    assert [*run.steps.reasons.values()] == ["the model asks for the step's past"]


def test_hooks_are_called_and_moved_weights_are_seen() -> None:
    run, seen = Sequences(2, "bf16", torch.bfloat16), list[int]()
    for _ in range(4):
        run.step()
    hook = run.model.blocks[1].mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))  # pyright: ignore
    run.step()
    assert seen == [2, 2]
    hook.remove()
    with torch.no_grad():
        run.model.norm.weight.mul_(2)  # in place: the same program
        run.step()
        run.model.norm.weight = nn.Parameter(run.model.norm.weight * 2)
    for _ in range(3):
        run.step()
    run.replays(2)


def test_an_arena_of_its_own_has_programs_of_its_own() -> None:
    run = Sequences(2, "bf16", torch.bfloat16)
    for _ in range(4):
        run.step()
    run.arena = Arena(100, run.arena.page_bytes)
    run.arena.pages.fill_(0xFF)
    run.caches = [SequenceCache(run.model.layout, run.arena, run.precision) for _ in range(2)]
    for cache in run.caches:
        run.prefill(cache, 12)
    for _ in range(4):
        run.step()


def test_missing_pages_are_refused() -> None:
    run = Sequences(1, "bf16", torch.bfloat16)
    for _ in range(4):
        run.step()
    run.caches[0].num_tokens += 200
    with torch.inference_mode(), pytest.raises(IndexError, match="the sequence holds"):
        run.steps.logits([5], run.caches)

"""A step's calls of kernels, recorded while it runs and run again with one native call (as CUDA graphs do for a GPU's kernels).

What a call is given stays what it was: its addresses, and every number that Python computed. What changes from step to step must lie in
memory that is filled anew, or in the `StepSpans` that each run is given. Operations of torch in between are recorded as well, and called
again with the same tensors: they cost what they cost, without the Python around them. A recording that could not be run again says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kvshare.kernels.native import available, module
from kvshare.kernels.scratch import Scratch, ScratchFullError
from kvshare.kernels.step_spans import StepSpans


class Program:
    """What `record` gives: the calls, and where their result lies."""

    def __init__(self, native: Any, parts: list[_NativeCalls | Callable[[], object]], result: Tensor, kept: list[object]):
        self._native, self._parts, self._kept = native, parts, kept
        self.result = result  # of every run; it lies in the recording's scratch, and is overwritten when anything recorded there runs

    @property
    def num_native_runs(self) -> int:
        """In how many native calls it runs; between them torch computes."""
        return sum(isinstance(part, tuple) for part in self._parts)

    @property
    def num_torch_operations(self) -> int:
        """What torch computes in front of native calls, between and behind them."""
        return len(self._parts) - self.num_native_runs

    def run(self, spans: StepSpans) -> Tensor:
        """Fills the `result` and returns it."""
        for part in self._parts:
            if isinstance(part, tuple):
                self._native.run(*part, *spans.where)
            else:
                part()
        return self.result


_NativeCalls = tuple[int, int]
"""First call and end."""


def record(compute: Callable[[], Tensor], spans: StepSpans, scratch: Scratch) -> tuple[Tensor, Program | str]:
    """`compute()`, whose temporaries lie in `scratch`, and its program; or why it cannot be run again.

    What it reads must be in tensors that exist before, and stay; nothing that it decides may depend on their contents.
    """
    native = module().Program(*spans.where)
    recorder = _Recorder(native, scratch)
    native.begin()
    try:
        with torch.inference_mode(), _ValuesRead(), recorder:
            result = compute()
    finally:
        native.end()
    recorder.close_native_calls()
    reason = native.refusal or ("" if scratch.holds(result) else "the result does not lie in the scratch")
    return result, reason or Program(native, recorder.parts, scratch.alias(result), [*recorder.kept, scratch])


def not_recorded(why: str) -> None:
    """A recording of this thread, if there is one, cannot be run again."""
    if available():
        module().not_recorded(why)


def records() -> bool:
    """Whether this thread records: then what calls are given must lie in tensors that the recording knows of."""
    return available() and module().records()


class _ValuesRead(TorchFunctionMode):
    """Notices when Python reads the contents of a tensor in a way that dispatches no operation."""

    _READ = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._READ:
            not_recorded(f"contents of a tensor read ({func.__name__})")
        return func(*args, **(kwargs or {}))


_aten: Any = torch.ops.aten
_ALLOCATE = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
_UNREPEATABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class _Recorder(TorchDispatchMode):
    """Gives what torch allocates a place in the scratch, and records what it computes between native calls."""

    def __init__(self, native: Any, scratch: Scratch):
        super().__init__()
        self.native, self.scratch = native, scratch
        self.parts: list[_NativeCalls | Callable[[], object]] = []
        self.kept: list[object] = []
        self._recorded = 0  # native calls that are in `parts`

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler, which takes a second, to keep it away from this class: nothing here is compiled."""
        return False

    def close_native_calls(self) -> None:
        if len(self.native) > self._recorded:
            self.parts.append((self._recorded, len(self.native)))
            self._recorded = len(self.native)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # inference mode does not take composite operations apart
            composed = func.decompose(*args, **kwargs)
        if composed is not NotImplemented:
            return composed
        if func.is_view or func is _aten.detach_.default:
            seen = func(*args, **kwargs)
            if func is _aten.lift_fresh.default:  # what Python made of numbers
                self.kept.append(seen)
            return seen
        if func in _ALLOCATE:
            return tree_map_only(Tensor, self._placed, func(*args, **kwargs))
        if any(tag in func.tags for tag in _UNREPEATABLE) and not (func is _aten.index.Tensor and _names_entries(args[1])):
            not_recorded(f"{func} depends on what tensors contain")
            return func(*args, **kwargs)
        again = tree_map_only(Tensor, self._held, (args, kwargs))
        self.close_native_calls()
        computed = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.parts.append(lambda: func(*again[0], **again[1]))
            return computed
        placed = tree_map_only(Tensor, lambda x: self._placed(x).copy_(x), computed)
        targets = [self._held(x) for x in tree_leaves(placed)]  # operations that give anything but tensors are tagged

        def compute_again() -> None:
            for target, x in zip(targets, tree_leaves(func(*again[0], **again[1])), strict=True):
                target.copy_(x)

        self.parts.append(compute_again)
        return placed

    def _placed(self, x: Tensor) -> Tensor:
        """A tensor like `x` in the scratch, where it fits."""
        if not x.numel() or not x.is_cpu:
            return x
        try:
            return self.scratch.like(x)
        except ScratchFullError as error:
            not_recorded(str(error))
            return torch.empty_like(x)

    def _held(self, x: Tensor) -> Tensor:
        """`x` as calls that run again hold it."""
        return self.scratch.alias(x) if self.scratch.holds(x) else x


def _names_entries(indices: list[Tensor | None]) -> bool:
    """Whether an indexing's tensors are numbers of entries. Masks say which to take, and so how many."""
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in indices)

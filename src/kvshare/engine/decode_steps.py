"""Steps in which every sequence runs one token: recorded when they come again, and from then on replayed (`kvshare.kernels.program`)."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import partial
from itertools import chain
from operator import is_not
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.recorded_step import RecordedStep
from kvshare.cache.tables import SequenceCache
from kvshare.kernels.program import Program, record
from kvshare.kernels.scratch import Scratch
from kvshare.kernels.step_spans import StepSpans, TokenSpan
from kvshare.models.model import Model

MOST_PROGRAMS = 16  # each of a batch size; the one that was not used for longest makes room
SCRATCH_BYTES = 256 << 20  # that temporaries of a step may take; memory that none needs is never touched

_log = logging.getLogger(__name__)


class Decoding(NamedTuple):
    """What a program was recorded for."""

    sequences: int
    arena: Arena
    isa: str


class _Recorded(NamedTuple):
    program: Program
    tokens: ctypes.Array[ctypes.c_int64]  # [sequences]: filled before each run, as are
    positions: ctypes.Array[ctypes.c_int64]  # [sequences]
    kept: tuple[Tensor, Tensor]  # whose memory these are
    rows: Sequence[Tensor]  # of the result


class DecodeSteps:
    """The logits of one-token steps of a model.

    A replay computes what the step itself would, bit for bit, without Python between the kernels. Where it cannot be done (a model that
    asks the step for more than attention, hooks on modules, gradients, no kernels), steps run as they are, and `reasons` says why. Weights
    may change in place; where a parameter is replaced, steps are recorded anew.
    """

    def __init__(self, model: Model, cache: PagedCache):
        self.model, self.cache = model, cache
        self.reasons: dict[Decoding, str] = {}  # why steps are not replayed
        self._recorded: dict[Decoding, _Recorded] = {}  # the one used last at the end
        self._met: set[Decoding] = set()
        self._scratch: Scratch | None = None
        self._model_seen = _Seen(model)

    @property
    def num_programs(self) -> int:
        return len(self._recorded)

    @property
    def reason(self) -> str | None:
        """Why steps, or those of some number of sequences, are not replayed; None where they are, as far as they came again."""
        return next(iter(self.reasons.values()), None)

    def describe(self) -> str:
        """How steps were run so far, for people."""
        if self._recorded:
            each = max((recorded.program for recorded in self._recorded.values()), key=lambda program: program.num_torch_operations)
            torch_too = f" and {each.num_torch_operations} operations of torch" if each.num_torch_operations else ""
            return f"decode steps replayed in {each.num_native_runs} native call{'s' * (each.num_native_runs != 1)}{torch_too}"
        return f"decode steps not replayed: {self.reason or 'none came again'}"

    def logits(self, tokens: Sequence[int], caches: Sequence[SequenceCache]) -> Sequence[Tensor]:  # -> float32 [vocab] of each sequence
        """Append a token to each sequence, whose cache has reserved its place. The result is overwritten by the next step."""
        if not self._may_record(caches[0].arena):
            return self._compute(torch.tensor(tokens), PagedStep(self.cache, caches, [1] * len(caches))).unbind()
        decoding = Decoding(len(caches), caches[0].arena, kernels.isa())
        recorded = self._recorded.pop(decoding, None)
        if recorded is not None:
            self._recorded[decoding] = recorded
            return self._replay(recorded, tokens, caches)
        if decoding in self._met and decoding not in self.reasons:
            return self._record(decoding, tokens, caches)
        self._met.add(decoding)
        return self._compute(torch.tensor(tokens), PagedStep(self.cache, caches, [1] * len(caches))).unbind()

    def _may_record(self, arena: Arena) -> bool:
        if not (kernels.available() and arena.pages.is_cpu and torch.is_inference_mode_enabled()):
            return False
        if self._model_seen.changed():
            self._recorded.clear()
            self._model_seen = _Seen(self.model)
        return not self._model_seen.has_hooks()

    def _compute(self, tokens: Tensor, step: PagedStep) -> Tensor:
        return self.model.logits(self.model(tokens, step)).float()

    def _replay(self, recorded: _Recorded, tokens: Sequence[int], caches: Sequence[SequenceCache]) -> Sequence[Tensor]:
        past = [cache.num_tokens for cache in caches]
        recorded.tokens[:] = tokens
        recorded.positions[:] = past
        spans = [TokenSpan(cache.page_runs, first, 1, row) for row, (cache, first) in enumerate(zip(caches, past, strict=True))]
        recorded.program.run(StepSpans(spans))
        return recorded.rows

    def _record(self, decoding: Decoding, tokens: Sequence[int], caches: Sequence[SequenceCache]) -> Sequence[Tensor]:
        if self._scratch is None:
            self._scratch = Scratch(SCRATCH_BYTES)
        step, inputs = RecordedStep(self.cache, caches, [1] * len(caches)), torch.tensor(tokens)
        logits, program = record(partial(self._compute, inputs, step), step.prepare(), self._scratch)
        if isinstance(program, str):
            self.reasons[decoding] = program
            _log.debug("steps of %d sequences are not replayed: %s", decoding.sequences, program)
        else:
            if len(self._recorded) >= MOST_PROGRAMS:
                del self._recorded[next(iter(self._recorded))]
            self._recorded[decoding] = _Recorded(
                program, _numbers(inputs), _numbers(step.positions), (inputs, step.positions), program.result.unbind()
            )
            _log.debug("steps of %d sequences are replayed in %d native calls", decoding.sequences, program.num_native_runs)
        return logits.unbind()


def _numbers(x: Tensor) -> ctypes.Array[ctypes.c_int64]:  # int64 [n]
    """The memory of `x`, which Python fills faster than torch does."""
    return (ctypes.c_int64 * len(x)).from_address(x.data_ptr())


class _Seen:
    """What of a model a recording depends on and others may change: where its weights lie, and hooks."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._tensors = [tensors for module in modules for tensors in (module._parameters, module._buffers) if tensors]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._addresses = self._find()
        self._handles, self._hooked = -1, False

    def _find(self) -> list[int]:
        tensors = chain.from_iterable(map(dict.values, self._tensors))  # asked in every step: no Python for each of them
        return list(map(Tensor.data_ptr, filter(partial(is_not, None), tensors)))

    def changed(self) -> bool:
        return self._find() != self._addresses

    def has_hooks(self) -> bool:
        if self._hooked or self._handles != RemovableHandle.next_id:  # every hook that is registered takes the next number
            self._handles, self._hooked = RemovableHandle.next_id, any(self._hooks)
        return self._hooked

"""Finding the cheapest cache that stays within a divergence: measure each owner alone, order the steps, verify assignments as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvshare.checkpoints.progress import Progress
from kvshare.errors import RequestError
from kvshare.evaluation.divergence import Divergence, divergences
from kvshare.layout import CacheLayout, PrecisionChoice
from kvshare.layout.rows import precision_named
from kvshare.models.model import Model
from kvshare.tuning.assignment import Assignment, greedy_path
from kvshare.tuning.candidates import candidates_for

REFERENCE = "bf16"
SAMPLED = 8  # of so many positions one is compared where owners are measured alone, which only orders the steps
STEPS_BEHIND = 8  # of the greedy path that are tried behind the first one that leads too far


@dataclass(frozen=True, slots=True)
class Measured:
    """A precision of the cache, or of one owner's rows: bytes at the tuning's context, and what it does to predictions."""

    bytes: int
    divergence: Divergence


@dataclass(frozen=True, slots=True)
class Tuning:
    """`owners` by layer and precision, that owner alone being stored so; `uniform` by precision of all owners; `chosen` and its cost."""

    context: int
    target_kl: float
    reference_bytes: int
    owners: Mapping[int, Mapping[str, Measured]]
    uniform: Mapping[str, Measured]
    chosen: Assignment
    found: Measured


def tune(
    model: Model,
    windows: Sequence[Sequence[int]],
    target_kl: float,
    candidates: Sequence[str] | None = None,  # of `candidates_for` the layout
    context: int = 32_768,
    progress: Progress | None = None,
) -> Tuning:
    """Assign `candidates` or bf16 to each owner: few bytes at `context` tokens, and a KL from bf16 of at most `target_kl`.

    Measured on `windows` of token ids. Owners are measured alone, at every eighth position, and ordered by bytes saved a nat; the
    farthest assignment on that path that meets the target is found by halving, and then a few of the steps behind it are tried one by one.
    Whatever is tried is measured as a whole and at every position, so the result meets the target; it need not be the best of all
    assignments. Raises `RequestError` for a target that is not positive and `ConfigError` for an unknown precision.
    """
    if not target_kl > 0:
        raise RequestError(f"the target KL must be above 0, not {target_kl:g}: 0.01 nats a token is hard to notice, 0.001 is free")
    layout = model.layout
    named = candidates_for(layout) if candidates is None else candidates
    names = [precision_named(name).name for name in dict.fromkeys(named) if name != REFERENCE]
    if not names:
        raise RequestError(f"nothing to choose from: name precisions other than {REFERENCE}")
    trial = _Trial(model, windows, context, progress, len(layout.owners) * len(names) + len(names))
    singles = [{-1: REFERENCE, owner: name} for owner in layout.owners for name in names]
    measured = trial.measure(singles, SAMPLED)
    owners = {
        owner: {
            name: Measured(owner_bytes(layout, owner, name, context), measured[row * len(names) + column].divergence)
            for column, name in enumerate(names)
        }
        for row, owner in enumerate(layout.owners)
    }
    uniform = dict(zip(names, trial.measure(names), strict=True))
    chosen, found = _cheapest(trial, owners, uniform, target_kl)
    return Tuning(context, target_kl, layout.bytes(context, 1, REFERENCE), owners, uniform, chosen, found)


def owner_bytes(layout: CacheLayout, owner: int, precision: str, context: int) -> int:
    """Bytes of one owner's live rows after `context` tokens."""
    form = precision_named(precision)
    return sum(stream.live_rows(context) * stream.row_bytes(form) for stream in layout.stored_in({owner: precision}).layers[owner].streams)


class _Trial:
    """Measures precisions, and reports how far it has come of what is known to be ahead."""

    def __init__(self, model: Model, windows: Sequence[Sequence[int]], context: int, progress: Progress | None, ahead: int):
        self.model, self.windows, self.context = model, windows, context
        self._progress, self._done, self._ahead = progress, 0, ahead * len(windows)

    def measure(self, precisions: Sequence[PrecisionChoice], every: int = 1) -> list[Measured]:
        found = divergences(self.model, self.windows, REFERENCE, precisions, self._watch, every)
        return [
            Measured(self.model.layout.bytes(self.context, 1, precision), divergence)
            for precision, divergence in zip(precisions, found, strict=True)
        ]

    def _watch(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, max(self._ahead, self._done + 1))


def _cheapest(
    trial: _Trial, owners: Mapping[int, Mapping[str, Measured]], uniform: Mapping[str, Measured], target: float
) -> tuple[Assignment, Measured]:
    """What the greedy path leads to within the target, or the smallest of one precision for all that meets it."""
    layout = trial.model.layout
    options = {
        owner: {
            REFERENCE: (owner_bytes(layout, owner, REFERENCE, trial.context), 0.0),
            **{name: (one.bytes, one.divergence.kl) for name, one in forms.items()},
        }
        for owner, forms in owners.items()
    }
    path = greedy_path(options, REFERENCE)
    reached: dict[int, Measured] = {0: trial.measure([path[0]])[0]}  # nothing encoded always meets it
    low, high = 0, len(path)
    while high - low > 1:
        middle = (low + high) // 2
        tried = trial.measure([path[middle]])[0]
        if tried.divergence.kl <= target:
            low, reached[middle] = middle, tried
        else:
            high = middle
    best = path[low], reached[low]
    for before, after in list(pairwise(path[low:]))[1 : 1 + STEPS_BEHIND]:  # the first of them is known to lead too far
        owner = next(owner for owner in after if after[owner] != before[owner])
        assignment = {**best[0], owner: after[owner]}
        tried = trial.measure([assignment])[0]
        if tried.divergence.kl <= target and tried.bytes < best[1].bytes:
            best = assignment, tried
    for name, one in uniform.items():
        if one.divergence.kl <= target and one.bytes < best[1].bytes:
            best = dict.fromkeys(owners, name), one
    return best

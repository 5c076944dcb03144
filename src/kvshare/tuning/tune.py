"""Finding the cheapest cache that stays within a divergence: measure each owner alone, order the steps, verify assignments as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvshare.checkpoints.progress import Progress
from kvshare.errors import RequestError
from kvshare.evaluation.divergence import Comparison, Divergence, Known
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
    """`owners` by layer and precision, that owner alone being stored so; `uniform` by precision of all owners; `chosen` and its cost.

    One that was interrupted has no `owners` if that was before all had been measured; what is chosen meets the target all the same.
    """

    context: int
    target_kl: float
    reference_bytes: int
    owners: Mapping[int, Mapping[str, Measured]]
    uniform: Mapping[str, Measured]
    chosen: Assignment
    found: Measured
    interrupted: bool = False


def tune(
    model: Model,
    windows: Sequence[Sequence[int]],
    target_kl: float,
    candidates: Sequence[str] | None = None,  # of `candidates_for` the layout
    context: int = 32_768,
    progress: Progress | None = None,
    known: Known | None = None,
) -> Tuning:
    """Assign `candidates` or bf16 to each owner: few bytes at `context` tokens, and a KL from bf16 of at most `target_kl`.

    Measured on `windows` of token ids. Owners are measured alone, at every eighth position, and ordered by bytes saved a nat; the
    farthest assignment on that path that meets the target is found by halving, and then a few of the steps behind it are tried one by one.
    Whatever is tried is measured as a whole and at every position, so the result meets the target; it need not be the best of all
    assignments. Ctrl-C ends it with the best that was found by then, and measurements stay in `known` for the next time.
    Raises `RequestError` for a target that is not positive and `ConfigError` for an unknown precision.
    """
    if not target_kl > 0:
        raise RequestError(f"the target KL must be above 0, not {target_kl:g}: 0.01 nats a token is hard to notice, 0.001 is free")
    layout = model.layout
    named = candidates_for(layout) if candidates is None else candidates
    names = [precision_named(name).name for name in dict.fromkeys(named) if name != REFERENCE]
    if not names:
        raise RequestError(f"nothing to choose from: name precisions other than {REFERENCE}")
    steps = len(layout.owners) * len(names)
    trial = _Trial(model, windows, context, progress, len(names) + steps + steps.bit_length() + STEPS_BEHIND, known)
    exact = Measured(layout.bytes(context, 1, REFERENCE), Divergence(0.0, 0.0, 1.0, sum(map(len, windows))))
    uniform, owners = dict(zip(names, trial.measure(names), strict=True)), {}
    best = dict.fromkeys(layout.owners, REFERENCE), exact  # nothing encoded always meets it
    interrupted = False
    try:
        for name, one in uniform.items():
            if one.divergence.kl <= target_kl and one.bytes < best[1].bytes:
                best = dict.fromkeys(layout.owners, name), one
        owners = _alone(trial, names)
        for assignment, one in _within(trial, owners, target_kl):
            if one.bytes <= best[1].bytes:  # of two alike, the one that encodes only what pays
                best = assignment, one
    except KeyboardInterrupt:
        interrupted = True
    return Tuning(context, target_kl, exact.bytes, owners, uniform, *best, interrupted)


def _alone(trial: _Trial, names: Sequence[str]) -> dict[int, dict[str, Measured]]:
    """Every owner alone in every precision."""
    layout = trial.model.layout
    measured = iter(trial.measure([{-1: REFERENCE, owner: name} for owner in layout.owners for name in names], SAMPLED))
    return {
        owner: {name: Measured(owner_bytes(layout, owner, name, trial.context), next(measured).divergence) for name in names}
        for owner in layout.owners
    }


def owner_bytes(layout: CacheLayout, owner: int, precision: str, context: int) -> int:
    """Bytes of one owner's live rows after `context` tokens."""
    form = precision_named(precision)
    return sum(stream.live_rows(context) * stream.row_bytes(form) for stream in layout.stored_in({owner: precision}).layers[owner].streams)


class _Trial:
    """Measures precisions, and reports how far it has come of what is known to be ahead."""

    def __init__(
        self,
        model: Model,
        windows: Sequence[Sequence[int]],
        context: int,
        progress: Progress | None,
        ahead: int,
        known: Known | None,
    ):
        self.model, self.context = model, context
        self._comparisons = {every: Comparison(model, windows, REFERENCE, every, known) for every in (1, SAMPLED)}
        self._progress, self._done, self._ahead = progress, 0, ahead * len(windows)

    def measure(self, precisions: Sequence[PrecisionChoice], every: int = 1) -> list[Measured]:
        found = self._comparisons[every].of(precisions, self._watch)
        return [
            Measured(self.model.layout.bytes(self.context, 1, precision), divergence)
            for precision, divergence in zip(precisions, found, strict=True)
        ]

    def _watch(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, max(self._ahead, self._done + 1))


def _within(trial: _Trial, owners: Mapping[int, Mapping[str, Measured]], target: float) -> Iterator[tuple[Assignment, Measured]]:
    """Assignments within the target along the greedy path, each with fewer bytes than those before."""
    layout = trial.model.layout
    options = {
        owner: {
            REFERENCE: (owner_bytes(layout, owner, REFERENCE, trial.context), 0.0),
            **{name: (one.bytes, one.divergence.kl) for name, one in forms.items()},
        }
        for owner, forms in owners.items()
    }
    path = greedy_path(options, REFERENCE)
    low, high = 0, len(path)
    while high - low > 1:
        middle = (low + high) // 2
        tried = trial.measure([path[middle]])[0]
        if tried.divergence.kl <= target:
            low = middle
            yield path[middle], tried
        else:
            high = middle
    best = path[low]
    for before, after in list(pairwise(path[low:]))[1 : 1 + STEPS_BEHIND]:  # the first of them is known to lead too far
        owner = next(owner for owner in after if after[owner] != before[owner])
        assignment = {**best, owner: after[owner]}
        tried = trial.measure([assignment])[0]
        if tried.divergence.kl <= target and tried.bytes < layout.bytes(trial.context, 1, best):
            best = assignment
            yield assignment, tried

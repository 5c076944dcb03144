"""From what each owner costs alone to assignments worth trying: a greedy path from everything exact to everything cheap."""

from __future__ import annotations

from collections.abc import Mapping

Options = Mapping[str, tuple[int, float]]
"""By precision: bytes of the owner's rows, and the divergence when this owner alone is stored so."""

Assignment = dict[int, str]

_NOTHING = 1e-12  # nats: less divergence than this is none


def greedy_path(options: Mapping[int, Options], start: str) -> list[Assignment]:
    """Assignments of precisions to owners, each with fewer bytes than the one before, from `start` everywhere on.

    The next step is always the one that saves most bytes for each nat that it adds, counting divergences of single owners as if they
    summed up. That is nearly so for small ones; what an assignment really costs has to be measured.
    """
    current = dict.fromkeys(options, start)
    path = [dict(current)]
    while True:
        moves = []
        for owner, forms in options.items():
            size, cost = forms[current[owner]]
            for name, (smaller, dearer) in forms.items():
                if smaller < size:
                    moves.append(((size - smaller) / max(dearer - cost, _NOTHING), owner, name))
        if not moves:
            return path
        _, owner, name = max(moves)
        current[owner] = name
        path.append(dict(current))

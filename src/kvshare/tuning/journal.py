"""What a tuning has measured, on disk while it runs: one that is interrupted goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path

import kvshare
from kvshare.checkpoints.user_cache import cache_directory
from kvshare.evaluation.divergence import Sums


class Journal(MutableMapping[str, Sums]):
    """Measurements by name, a line each in a file that `forget` removes. A line that was torn off in the middle is measured again.

    Where the file cannot be written they are kept in memory, and `failure` says why.
    """

    def __init__(self, path: Path):
        self.path, self.failure = path, ""
        self._found: dict[str, Sums] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                name, sums = json.loads(line)
                self._found[name] = Sums(*sums)
            except (ValueError, TypeError):
                continue

    def __getitem__(self, name: str) -> Sums:
        return self._found[name]

    def __setitem__(self, name: str, found: Sums) -> None:
        self._found[name] = found
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps([name, found]))  # in front: the line before may have been torn off
        except OSError as error:
            self.failure = str(error)

    def __delitem__(self, name: str) -> None:
        del self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def forget(self) -> None:
        """Remove the file: the tuning is done."""
        self.path.unlink(missing_ok=True)


def journal_for(model: Path, windows: Sequence[Sequence[int]], settings: Sequence[str]) -> Journal:
    """The journal of measurements on this model's files as they are now, this text, and what else they depend on."""
    files = sorted(each for each in model.iterdir() if each.is_file()) if model.is_dir() else [model]
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = json.dumps([kvshare.__version__, stamps, [list(ids) for ids in windows], list(settings)])
    return Journal(cache_directory() / "tuning" / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.jsonl")

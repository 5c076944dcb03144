from __future__ import annotations

from pathlib import Path

import pytest
from cli.command import Command
from fixtures import tiny_llama


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with readers, windows and a chat template."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return tiny_llama(tmp_path_factory.mktemp("tiny_base"), chat_template=None)

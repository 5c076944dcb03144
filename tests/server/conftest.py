"""Fixtures: the tiny model's files, the model without a server, and one server that all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures import tiny_llama
from server.harness import CONTEXT, Server, load_tiny, serving

from kvshare import LLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context so long that a request can outlive any test."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> LLM:
    """The same model without a server: what a client must get."""
    return load_tiny(checkpoint)


@pytest.fixture(scope="session")
def shared_server(checkpoint: Path) -> Iterator[Server]:
    with serving(lambda: load_tiny(checkpoint)) as server:
        server.wait_until_loaded()
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """One server for all tests, idle before and after each."""
    yield shared_server
    shared_server.assert_idle()

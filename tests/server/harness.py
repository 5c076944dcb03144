"""A real server on a real socket: uvicorn in a thread, the engine in its own, a tiny random model behind them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai

from kvshare import LLM
from kvshare.server.app import create_app
from kvshare.server.run import address_of, is_loopback, listen, make_server
from kvshare.server.worker import Worker

MODEL = "tiny"
CONTEXT = 32_768
LONG: dict[str, Any] = {"model": MODEL, "prompt": "once", "max_tokens": 30_000, "ignore_eos": True, "temperature": 0}
"""A completion that takes minutes."""

LONG_SDK: dict[str, Any] = {**{name: value for name, value in LONG.items() if name != "ignore_eos"}, "extra_body": {"ignore_eos": True}}
"""The same, as the `openai` client wants it."""

PATIENCE = 30.0  # seconds until something that must happen counts as not happening


def eventually(condition: Callable[[], Any], what: str) -> None:
    """Wait for another thread to get there."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {PATIENCE:g} seconds"
        time.sleep(0.005)


class Server:
    """A running server and what it holds."""

    def __init__(self, load: Callable[[], LLM], *, max_requests: int = 64, api_key: str | None = None):
        self.sock = listen("127.0.0.1", 0)
        self.worker = Worker(load)
        self.app = create_app(self.worker, MODEL, max_requests, api_key, local_only=is_loopback(self.sock) and api_key is None)
        self.uvicorn = make_server(self.app)
        self.address, self.port = address_of(self.sock), self.sock.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.uvicorn.serve(sockets=[self.sock])))
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key=api_key or "none", max_retries=0)
        self.http = httpx.Client(base_url=self.address, headers={"Authorization": f"Bearer {api_key}"} if api_key else {}, timeout=PATIENCE)

    @property
    def llm(self) -> LLM:
        assert self.worker.llm is not None
        return self.worker.llm

    @property
    def num_requests(self) -> int:
        return self.app.state.api.num_requests

    def wait_until_loaded(self) -> None:
        eventually(lambda: self.worker.llm or self.worker.failure, "loading")
        if self.worker.failure is not None:
            raise self.worker.failure

    def assert_idle(self) -> None:
        """Nothing runs or waits, every place is free, and so is every page."""
        eventually(lambda: not self.llm.engine.has_work and not self.num_requests, "becoming idle")
        assert not self.llm.engine.scheduler.running
        assert not self.llm.engine.scheduler.waiting
        assert self.llm.arena.num_free == self.llm.arena.num_pages
        self.llm.arena.check_integrity()


@contextlib.contextmanager
def serving(load: Callable[[], LLM], **options: Any) -> Iterator[Server]:
    server = Server(load, **options)
    server.thread.start()
    try:
        eventually(lambda: server.uvicorn.started, "starting")
        yield server
    finally:
        server.http.close()
        server.client.close()
        server.uvicorn.should_exit = True
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    """A raw connection."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", server.port))
    return sock


def http_request(content: Mapping[str, Any], path: str = "/v1/completions") -> bytes:
    """The bytes of a POST."""
    body = json.dumps(content).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_to_end(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            received += part
    return bytes(received)


def load_tiny(directory: Path, **options: Any) -> LLM:
    return LLM(directory, dtype="float32", progress=False, **options)

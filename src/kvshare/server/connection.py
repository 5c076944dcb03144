"""Connections that do not get to waste the server's time: a deadline for a request's headers, one for reading answers, and a number."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
MAX_HEADER_BYTES = 64 << 10
HEADER_SECONDS = 20.0  # from the connection, or from the first byte of a further request, to the end of its headers
WRITE_SECONDS = 60.0  # for a client to take what the kernel does not hold, or at least ...
LEAST_WRITE_BYTES = 64 << 10  # ... this much of it; then the connection is cut


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with the deadlines that it leaves to a proxy in front."""

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does not for a socket made elsewhere: 40 ms an answer
        transport.set_write_buffer_limits(high=0)  # any byte that waits in this process starts the write deadline
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._idle:
            self._expect_headers()
        super().data_received(data)
        if not self._idle:
            self._header_timer = _cancel(self._header_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_timer, self._write_timer = _cancel(self._header_timer), _cancel(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._expect_reading()

    def resume_writing(self) -> None:
        self._write_timer = _cancel(self._write_timer)
        super().resume_writing()

    def _expect_reading(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._check_reading, waiting)

    def _check_reading(self, waiting: int) -> None:
        """A long answer over a slow line goes on; one that (almost) nobody reads does not."""
        if waiting - self.transport.get_write_buffer_size() >= LEAST_WRITE_BYTES:
            self._expect_reading()
        else:
            self.transport.abort()

    @property
    def _idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

"""Clients that misbehave below HTTP, over raw sockets: they are cut off, and nobody else notices."""

from __future__ import annotations

import itertools
import socket
import time
from pathlib import Path

import pytest
from server.harness import LONG, MODEL, PATIENCE, Server, connect, eventually, http_request, load_tiny, read_to_end, serving

from kvshare.server import app, connection

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SHORT = {"model": MODEL, "prompt": "x", "max_tokens": 4}


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer.split()[1])


def read_answer(sock: socket.socket) -> bytes:
    """One answer of a connection that stays open: headers, and as much as they announce."""
    received = b""
    while b"\r\n\r\n" not in received and (part := sock.recv(1 << 16)):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
    while len(body) < length:
        body += sock.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def trickle(sock: socket.socket, data: bytes) -> None:
    """A byte at a time until the other side has had enough."""
    end = time.monotonic() + PATIENCE
    try:
        for byte in itertools.cycle(data):
            sock.sendall(bytes([byte]))
            time.sleep(0.02)
            assert time.monotonic() < end, "the server puts up with it"
    except (BrokenPipeError, ConnectionResetError):
        pass


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [b"", b"GET", HEAD], ids=["nothing", "half a word", "half the headers"])
def test_a_connection_that_does_not_go_on_is_closed(server: Server, sent: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(sent)
        assert read_to_end(sock) == b""


@pytest.mark.usefixtures("impatient")
def test_headers_that_trickle_in_are_not_waited_for(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(HEAD + b"X-Slow: ")
        trickle(sock, b"a")


@pytest.mark.usefixtures("impatient")
def test_neither_are_those_of_a_second_request(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(http_request(SHORT))
        assert status(read_answer(sock)) == 200
        sock.sendall(HEAD + b"X-Slow: ")
        trickle(sock, b"a")


@pytest.mark.usefixtures("impatient")
def test_a_request_may_take_longer_than_its_headers(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(http_request({**LONG, "max_tokens": 800}))
        assert status(read_answer(sock)) == 200


@pytest.mark.usefixtures("impatient")
def test_a_body_that_does_not_come_is_not_waited_for(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert status(read_answer(sock)) == 408
    server.assert_idle()


def test_headers_that_do_not_end(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(HEAD + b"X-Big: " + b"a" * (connection.MAX_HEADER_BYTES + 1))
        assert status(read_to_end(sock)) == 400


def test_headers_that_end_too_late(server: Server) -> None:
    """However the bytes arrive: the parser's own limit is for headers that are not complete yet."""
    with connect(server) as sock:
        sock.sendall(HEAD + b"X-Big: " + b"a" * (connection.MAX_HEADER_BYTES + 1) + b"\r\n\r\n")
        assert status(read_answer(sock)) in (400, 431)


def test_a_body_that_announces_too_much(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (app.MAX_BODY_BYTES + 1))
        assert status(read_answer(sock)) == 413


def test_a_body_that_announces_nothing_and_is_too_long(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(app.MAX_BODY_BYTES // 0x10000 + 1):
            sock.sendall(chunk)
        answer = read_answer(sock)
    assert status(answer) == 413
    assert f"{app.MAX_BODY_BYTES:,}".encode() in answer


def test_a_body_of_the_greatest_length_is_read(server: Server) -> None:
    body = b" " * (app.MAX_BODY_BYTES - 2) + b"{}"
    assert server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}).status_code == 400


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 1000 + b"x",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 1e3\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    ],
    ids=lambda noise: repr(noise[-40:]),
)
def test_noise(server: Server, noise: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(noise)
        sock.shutdown(socket.SHUT_WR)
        answer = read_to_end(sock)
    assert answer == b"" or 400 <= status(answer) < 500
    assert server.http.get("/health").status_code == 200


def test_small_writes_are_sent_at_once(server: Server) -> None:
    """Without TCP_NODELAY every answer, and every event of a stream, waits for the client's delayed acknowledgement."""
    with connect(server) as sock:
        sock.sendall(http_request(SHORT))
        assert status(read_answer(sock)) == 200
        accepted = [own.transport.get_extra_info("socket") for own in server.uvicorn.server_state.connections]
        assert accepted
        assert all(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for own in accepted)


def test_many_idle_connections_leave_room(server: Server) -> None:
    idle = [connect(server) for _ in range(200)]
    assert server.client.completions.create(**SHORT).choices
    for sock in idle:
        sock.close()


def test_more_connections_than_allowed_are_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    eventually(lambda: len(server.uvicorn.server_state.connections) <= 2, "closing what other tests left open")
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 5)
    socks = [connect(server) for _ in range(8)]
    assert sum(read_to_end(sock) == b"" for sock in socks[5:]) == 3
    for sock in socks:
        sock.close()


def test_a_client_that_does_not_read_is_cut_off_and_stops_nobody(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills the kernel's buffers, then waits in this process until the deadline; others are answered meanwhile."""
    with serving(lambda: load_tiny(checkpoint)) as server:
        server.wait_until_loaded()
        server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        paused = []
        pause = connection.BoundedProtocol.pause_writing

        def noted(self: connection.BoundedProtocol) -> None:
            paused.append(self)
            pause(self)

        monkeypatch.setattr(connection.BoundedProtocol, "pause_writing", noted)
        with connect(server, receive_buffer=4096) as sock:
            sock.sendall(http_request({**LONG, "stream": True, "logprobs": 20}))
            eventually(lambda: paused, "filling the buffers")
            assert server.client.completions.create(**SHORT).choices
            assert server.llm.engine.has_work
        server.assert_idle()
        monkeypatch.setattr(connection, "WRITE_SECONDS", 0.3)
        with connect(server, receive_buffer=4096) as sock:
            sock.sendall(http_request({**LONG, "stream": True, "logprobs": 20}))
            eventually(lambda: server.llm.engine.has_work, "starting")
            server.assert_idle()

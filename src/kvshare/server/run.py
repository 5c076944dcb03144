"""Running the application on a socket until it is told to stop."""

from __future__ import annotations

import ipaddress
import socket

import uvicorn
from starlette.types import ASGIApp

from kvshare.errors import RequestError
from kvshare.server.connection import MAX_HEADER_BYTES, BoundedProtocol

KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, so that it is they who close it
GRACE_SECONDS = 5  # for running requests when the server stops; then they are cancelled
_BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `RequestError` where the address cannot be used."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        raise RequestError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None


def is_loopback(sock: socket.socket) -> bool:
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def address_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(app: ASGIApp) -> uvicorn.Server:
    """uvicorn with every limit set. `server.run(sockets=[...])` returns after SIGINT, SIGTERM or `server.should_exit`."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
        log_level="warning",
    )
    return uvicorn.Server(config)

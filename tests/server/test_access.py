"""Who may ask: the key on every route, and only this machine where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from server.harness import MODEL, Server, load_tiny, serving
from starlette.routing import Route

KEY = "sk-local-1234"


@pytest.fixture(scope="module")
def locked(checkpoint: Path) -> Iterator[Server]:
    with serving(lambda: load_tiny(checkpoint), api_key=KEY) as server:
        server.wait_until_loaded()
        yield server


@pytest.mark.parametrize("given", [None, "", KEY, "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer \xe9"])
def test_every_route_but_health_needs_the_key(locked: Server, given: str | None) -> None:
    routes = [route for route in locked.app.routes if isinstance(route, Route)]
    assert {"/health", "/v1/models", "/v1/completions", "/v1/chat/completions"} <= {route.path for route in routes}
    locked.http.headers.pop("Authorization", None)
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    for path, methods in [*((route.path, route.methods or set()) for route in routes), ("/unknown", {"GET", "POST"})]:
        for method in methods:
            answer = locked.http.request(method, path, headers=headers)  # pyright: ignore[reportArgumentType]
            if path == "/health":
                assert answer.status_code == 200
            else:
                assert answer.status_code == 401, (method, path)
                if method != "HEAD":
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                assert KEY not in answer.text


def test_the_right_key_opens(locked: Server) -> None:
    assert locked.client.models.list().data[0].id == MODEL
    assert locked.http.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        locked.client.with_options(api_key="other").models.list()


def test_a_server_with_a_key_answers_under_any_name(locked: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Host": "models.example.org"}
    assert locked.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::2]"])
def test_another_site_cannot_reach_an_open_local_server(server: Server, host: str) -> None:
    answer = server.http.get("/v1/models", headers={"Host": host})
    assert answer.status_code == 403
    assert "--api-key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.1.2.3:8000", "[::1]", "[::1]:8000"])
def test_this_machine_can(server: Server, host: str) -> None:
    assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200

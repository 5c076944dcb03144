"""The routes of the API and the life of a request: a place in the queue, the body, the engine, the answer."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvshare.server.answers import Answer, ChatAnswer, CompletionAnswer
from kvshare.server.connection import MAX_HEADER_BYTES
from kvshare.server.errors import ApiError
from kvshare.server.prepare import Work, check_context, prepare_chat, prepare_completion
from kvshare.server.requests import ChatRequest, CompletionRequest, GenerationRequest, parse
from kvshare.server.worker import Job, Worker

if TYPE_CHECKING:
    from kvshare.engine.llm import LLM

MAX_BODY_BYTES = 8 << 20
BODY_SECONDS = 30.0  # for a client to send its body
CLIENT_GONE = 499  # what logs call a request whose client left; nobody reads the answer

AnyResult = TypeVar("AnyResult")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One generation API: how a request is read, prepared and answered."""

    request: type[GenerationRequest]
    prepare: Callable[[LLM, Any], Work]
    answer: type[Answer]

    def read(self, llm: LLM, model_name: str, body: bytes) -> tuple[GenerationRequest, Work]:
        """Everything that can be refused before the engine hears of it. Takes as long as the tokenizer does: not for the event loop."""
        request = parse(self.request, body)
        if request.model != model_name:
            message = f"the model {request.model[:200]!r} does not exist; this server has {model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        work = self.prepare(llm, request)
        check_context(llm, work)
        return request, work


CHAT = Endpoint(ChatRequest, prepare_chat, ChatAnswer)
COMPLETION = Endpoint(CompletionRequest, prepare_completion, CompletionAnswer)


class Api:
    """The handlers. `max_requests` may be under way at once, running and queued; the next one is told to come back."""

    def __init__(self, worker: Worker, model_name: str, max_requests: int):
        self.worker, self.model_name, self.max_requests = worker, model_name, max_requests
        self.num_requests = 0
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        """200 when requests can be answered, 503 while the model loads or after the engine ended."""
        if self.worker.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"}) if self.worker.llm else JSONResponse({"status": "loading"}, 503)

    async def models(self, request: Request) -> Response:
        entry = {"id": self.model_name, "object": "model", "created": self._started, "owned_by": "kvshare"}
        if self.worker.llm is not None:
            entry["max_model_len"] = self.worker.llm.max_context
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, CHAT)

    async def completion(self, request: Request) -> Response:
        return await self._generate(request, COMPLETION)

    async def _generate(self, request: Request, endpoint: Endpoint) -> Response:
        """A request keeps its place until its last byte is sent or its client is gone, so that neither bodies nor answers pile up."""
        llm = self._ready()
        with contextlib.ExitStack() as cleanup:
            cleanup.enter_context(self._place())
            try:
                body = await _read_body(request)
                asked, work = await asyncio.to_thread(endpoint.read, llm, self.model_name, body)
                job = Job(work.prompts, work.params)
                cleanup.callback(self.worker.cancel, job)
                self.worker.submit(job)
                await _while_connected(request, job.accepted())
                answer = endpoint.answer(self.model_name, llm.tokenizer, work, job)
                if asked.stream:
                    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
                    return EventStream(_events(answer, job, with_usage), cleanup.pop_all())
                pieces = await _while_connected(request, _all_pieces(job))
                return JSONResponse(answer.whole(pieces))
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)

    def _ready(self) -> LLM:
        if self.worker.failure is not None:
            raise ApiError(503, "the engine has ended; the server's log says why")
        if self.worker.llm is None:
            raise ApiError(503, "the model is still being loaded", code="loading", headers={"Retry-After": "5"})
        return self.worker.llm

    @contextlib.contextmanager
    def _place(self) -> Any:
        if self.num_requests >= self.max_requests:
            message = f"{self.num_requests} requests are under way, which is as many as this server takes: try again"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1


class EventStream(StreamingResponse):
    """Server-sent events. However it ends (finished, client gone, server stopping), `cleanup` runs."""

    def __init__(self, events: AsyncIterator[bytes], cleanup: contextlib.ExitStack):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream")
        self._cleanup = cleanup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._cleanup:
            await super().__call__(scope, receive, send)


class Gate:
    """In front of every route: without the key nothing answers but /health, and a page of another site cannot use a local server.

    A server on the loopback address without a key is open to whoever runs on this machine, which includes web pages in a browser;
    `local_only` refuses a `Host` that is not this machine (DNS rebinding), and JSON bodies need their content type (cross-site forms).
    """

    def __init__(self, app: ASGIApp, api_key: str | None, local_only: bool):
        self._app, self._key, self._local_only = app, api_key, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (self._app if refusal is None else refusal.response())(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        if sum(len(name) + len(value) for name, value in request.headers.raw) > MAX_HEADER_BYTES:
            return ApiError(431, f"the headers have more than {MAX_HEADER_BYTES:,} bytes, which is the most that is read")
        if self._local_only and not _is_local(request.headers.get("host", "")):
            return ApiError(403, "this server answers to localhost only: start it with --api-key to serve under other names")
        if request.scope["path"] == "/health":
            return None
        if self._key is not None and not self._has_key(request):
            message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return ApiError(415, "the body must be JSON: send it with `Content-Type: application/json`")
        return None

    def _has_key(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), (self._key or "").encode())


def create_app(worker: Worker, model_name: str, max_requests: int, api_key: str | None = None, local_only: bool = False) -> Starlette:
    """The ASGI application. It starts the worker when the server starts and stops it when the server ends."""
    api = Api(worker, model_name, max_requests)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = Starlette(
        routes=[
            Route("/health", api.health, methods=["GET"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completion, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, api_key=api_key, local_only=local_only)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _server_error},
        lifespan=lifespan,
    )
    app.state.api = api
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{error.detail}: {request.method} {request.scope['path'][:200]}", headers=error.headers).response()


async def _server_error(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed; its log says why").response()


async def _read_body(request: Request) -> bytes:
    """Raises `ApiError` for a body that is too long or too slow, `ClientDisconnect` if the client leaves."""
    too_long = ApiError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes, which is the most that is read")
    if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body was not sent within {BODY_SECONDS:g} seconds") from None
    return bytes(body)


async def _while_connected(request: Request, work: Coroutine[Any, Any, AnyResult]) -> AnyResult:
    """The result of `work`, or `ClientDisconnect` as soon as the client is gone; then the work is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all_pieces(job: Job) -> list[Any]:
    return [piece async for pieces in job.pieces() for piece in pieces]


async def _events(answer: Answer, job: Job, with_usage: bool) -> AsyncIterator[bytes]:
    empty_usage = {"usage": None} if with_usage else {}
    for chunk in answer.opening():
        yield _event({**chunk, **empty_usage})
    try:
        async for pieces in job.pieces():
            for chunk in answer.chunks(pieces):
                yield _event({**chunk, **empty_usage})
    except ApiError as error:
        yield _event(error.body)
        return
    if with_usage:
        yield _event(answer.closing())
    yield b"data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def _is_local(host: str) -> bool:
    """Whether a `Host` header, with or without a port, names the loopback interface."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower() == "localhost"

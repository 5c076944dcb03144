"""The one thread that owns the engine. Handlers submit jobs to it and read pieces of text from them; nothing else crosses over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from kvshare.errors import KVShareError
from kvshare.server.errors import ApiError, engine_failed

if TYPE_CHECKING:  # the server listens before torch is there
    from kvshare.engine.llm import LLM
    from kvshare.engine.outputs import FinishReason, TokenLogprobs, Update
    from kvshare.engine.sampling import SamplingParams
    from kvshare.engine.sequence import Request

logger = logging.getLogger("kvshare.server")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to one choice; nothing in it changes any more."""

    choice: int  # prompt by prompt, `n` choices of each
    token_id: int | None
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None


class Job:
    """The prompts of one HTTP request on their way through the engine. Made and read in the event loop; the worker only `post`s to it."""

    def __init__(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]):
        self.prompts, self.params = prompts, params
        self.prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # by prompt; complete before that prompt's first piece
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._pieces: list[Piece] = []
        self._accepted = False
        self._error: ApiError | None = None
        self._unfinished = sum(own.n for own in params)

    async def accepted(self) -> None:
        """Returns when the engine has taken all prompts. Raises `ApiError` if it refuses one; then it has taken none."""
        while not self._accepted:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What has come since the last time, in order, until every choice is finished. Raises `ApiError` if the engine fails.

        Whoever reads slowly gets more at once: what waits is never more than the tokens of the request itself.
        """
        while self._unfinished:
            if not self._pieces:
                await self._wait()
            new, self._pieces = self._pieces, []
            self._unfinished -= sum(piece.finish_reason is not None for piece in new)
            yield new

    async def _wait(self) -> None:
        if self._error is None:
            await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise self._error

    def post(self, pieces: Sequence[Piece] = (), error: ApiError | None = None) -> None:
        """From any thread: the engine accepted the job, gave pieces, or failed."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._receive, pieces, error)

    def _receive(self, pieces: Sequence[Piece], error: ApiError | None) -> None:
        self._accepted = True
        self._pieces.extend(pieces)
        self._error = self._error or error
        self._news.set()


@dataclass(frozen=True, slots=True)
class _Running:
    """One engine request of a job."""

    job: Job
    prompt: int
    request: Request

    def piece(self, update: Update) -> Piece:
        output = update.output
        choice = self.prompt * self.job.params[0].n + output.index
        return Piece(choice, update.token_id, update.text, update.logprobs, output.finish_reason)


class Worker:
    """Loads the model in its thread, then steps the engine while there is work and takes commands between steps.

    A cancelled job's pages are free before the next step. A step that raises fails the requests that were running, not the server.
    """

    def __init__(
        self, load: Callable[[], LLM], on_loaded: Callable[[LLM], None] | None = None, on_failed: Callable[[], None] | None = None
    ):
        self.llm: LLM | None = None  # None while it loads
        self.failure: BaseException | None = None  # why it could not load, or why the thread ended
        self._load, self._on_loaded, self._on_failed = load, on_loaded, on_failed
        self._inbox: SimpleQueue[Callable[[LLM], None] | None] = SimpleQueue()  # None: stop
        self._running: dict[int, _Running] = {}  # by engine request id
        self._said_slow = False
        self._thread = threading.Thread(target=self._run, name="kvshare-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel everything, free all pages and end the thread; returns when that is done. A model that still loads is not waited for."""
        self._inbox.put(None)
        if self.llm is not None:
            self._thread.join()

    def submit(self, job: Job) -> None:
        self._inbox.put(lambda llm: self._add(llm, job))

    def cancel(self, job: Job) -> None:
        """Forget a job, wherever it is; a finished one is no mistake."""
        self._inbox.put(lambda llm: self._cancel(llm, job))

    def _run(self) -> None:
        try:
            llm = self._load()
            self.llm = llm
            if self._on_loaded is not None:
                self._on_loaded(llm)
            self._serve(llm)
        except BaseException as error:
            if self.llm is not None:
                logger.exception("the engine's thread ended")
            self.failure = error
            for running in self._running.values():
                running.job.post(error=engine_failed())
            if self._on_failed is not None:
                self._on_failed()

    def _serve(self, llm: LLM) -> None:
        while True:
            with contextlib.suppress(Empty):
                while True:
                    command = self._inbox.get(block=not llm.engine.has_work)
                    if command is None:
                        self._drop(llm, list(self._running), ApiError(503, "the server is shutting down"))
                        return
                    command(llm)
            try:
                updates = llm.engine.step()
            except Exception:
                logger.exception("a step failed; the requests in it are answered with an error, the others go on")
                self._drop(llm, self._in_step(llm), engine_failed())
            else:
                self._deliver(llm, updates)
                slow = llm.engine.runner.decode_steps.reason
                if slow is not None and not self._said_slow:
                    self._said_slow = True
                    logger.warning("slower than it could be: decode steps are not replayed (%s)", slow)

    def _add(self, llm: LLM, job: Job) -> None:
        added: list[int] = []
        try:
            for index, (prompt, params) in enumerate(zip(job.prompts, job.params, strict=True)):
                request_id = llm.engine.add(prompt, params)
                added.append(request_id)
                self._running[request_id] = _Running(job, index, llm.engine.requests[request_id])
        except Exception as error:
            if not isinstance(error, KVShareError):
                logger.exception("a request could not be added")
            self._drop(llm, added, None)
            job.post(error=ApiError(400, str(error)) if isinstance(error, KVShareError) else engine_failed())
        else:
            job.post()

    def _cancel(self, llm: LLM, job: Job) -> None:
        self._drop(llm, [request_id for request_id, running in self._running.items() if running.job is job], None)

    def _in_step(self, llm: LLM) -> list[int]:
        """Requests that the failed step may have touched: all but those that only wait. If that is none, the queue itself is at fault."""
        waiting = set(llm.engine.scheduler.waiting)
        touched = [request_id for request_id, running in self._running.items() if not waiting.issuperset(running.request.sequences)]
        return touched or list(self._running)

    def _drop(self, llm: LLM, request_ids: Sequence[int], error: ApiError | None) -> None:
        """Cancel these requests and, where there is an error to tell, the rest of their jobs."""
        jobs = {self._running[request_id].job for request_id in request_ids} if error else set()
        for request_id in {*request_ids, *(other for other, running in self._running.items() if running.job in jobs)}:
            llm.engine.cancel(request_id)
            del self._running[request_id]
        for job in jobs:
            job.post(error=error)

    def _deliver(self, llm: LLM, updates: Sequence[Update]) -> None:
        pieces: dict[Job, list[Piece]] = {}
        for update in updates:
            running = self._running[update.request_id]
            logprobs = running.request.prompt_logprobs
            if logprobs is not None:
                running.job.prompt_logprobs[running.prompt] = logprobs
            pieces.setdefault(running.job, []).append(running.piece(update))
        for request_id in [request_id for request_id in self._running if request_id not in llm.engine.requests]:
            del self._running[request_id]
        for job, own in pieces.items():
            job.post(own)

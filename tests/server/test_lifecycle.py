"""Requests end in many ways; pages, places in the queue and the server itself outlive them all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fixtures import tiny_llama
from server.harness import LONG, LONG_SDK, MODEL, Server, connect, eventually, http_request, load_tiny, read_to_end, serving

from kvshare import LLM, SamplingParams
from kvshare.errors import CheckpointError
from kvshare.server.errors import ApiError
from kvshare.server.worker import Job, Worker

SHORT: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def narrow(checkpoint: Path) -> Iterator[Server]:
    """A server whose engine runs one sequence at a time and that takes three requests."""
    with serving(lambda: load_tiny(checkpoint, max_sequences=1), max_requests=3) as server:
        server.wait_until_loaded()
        yield server
        server.assert_idle()


def start(server: Server, count: int = 1, **fields: Any) -> list[Any]:
    """Send long requests over connections of their own and wait until the engine has them."""
    before = len(server.llm.engine.requests)
    socks = [connect(server) for _ in range(count)]
    for sock in socks:
        sock.sendall(http_request({**LONG, **fields}))
    eventually(lambda: len(server.llm.engine.requests) == before + count, "the engine taking the requests")
    return socks


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages(server: Server, stream: bool) -> None:
    (sock,) = start(server, stream=stream)
    eventually(lambda: server.llm.arena.num_held, "holding pages")
    sock.close()
    server.assert_idle()


def test_a_client_that_leaves_in_the_middle_of_a_stream_with_choices(server: Server) -> None:
    stream = server.client.completions.create(**{**LONG_SDK, "max_tokens": 2000}, n=3, stream=True)
    for _, _ in zip(range(20), stream, strict=False):
        pass
    stream.close()
    server.assert_idle()


def test_a_half_closed_connection_counts_as_gone(server: Server) -> None:
    (sock,) = start(server)
    sock.shutdown(1)
    server.assert_idle()
    sock.close()


def test_a_client_that_leaves_the_queue(narrow: Server) -> None:
    (running,) = start(narrow)
    first = next(iter(narrow.llm.engine.requests))
    queued, streamed = start(narrow, 1) + start(narrow, 1, stream=True)
    queued.close()
    streamed.close()
    eventually(lambda: list(narrow.llm.engine.requests) == [first], "forgetting the queued requests")
    assert not narrow.llm.engine.scheduler.waiting
    running.close()


def test_a_full_queue_says_when_to_come_back(narrow: Server) -> None:
    socks = start(narrow, 3)
    with pytest.raises(openai.RateLimitError) as caught:
        narrow.client.completions.create(**SHORT)
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert caught.value.code == "queue_full"
    assert narrow.http.get("/health").status_code == 200
    socks[0].close()
    eventually(lambda: narrow.num_requests == 2, "giving the place back")
    for sock in socks[1:]:
        sock.close()
    eventually(lambda: not narrow.num_requests, "giving all places back")
    assert narrow.client.completions.create(**SHORT).choices[0].finish_reason == "length"


def test_a_refused_request_gives_its_place_back(narrow: Server) -> None:
    for _ in range(5):
        with pytest.raises(openai.BadRequestError):
            narrow.client.completions.create(**{**SHORT, "prompt": [10**9]})
    assert narrow.num_requests == 0


def test_cancelling_takes_effect_before_the_next_step(checkpoint: Path) -> None:
    async def cancel_while_running() -> tuple[int, LLM]:
        worker, steps = Worker(lambda: load_tiny(checkpoint)), 0
        worker.start()
        while worker.llm is None:
            await asyncio.sleep(0.01)
        llm, step = worker.llm, worker.llm.engine.step

        def counted() -> Any:
            nonlocal steps
            steps += 1
            return step()

        llm.engine.step = counted  # pyright: ignore[reportAttributeAccessIssue]
        job = Job([[1, 2, 3]], [SamplingParams(max_tokens=20_000, ignore_eos=True)])
        worker.submit(job)
        async for _ in job.pieces():
            if steps >= 5:
                break
        worker.cancel(job)
        at_cancel = steps
        while llm.engine.has_work:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(worker.stop)
        return steps - at_cancel, llm

    more, llm = asyncio.run(cancel_while_running())
    assert more <= 1
    assert llm.arena.num_free == llm.arena.num_pages


def test_a_job_may_be_cancelled_before_it_is_added_and_after_it_ended(checkpoint: Path) -> None:
    async def run() -> LLM:
        llm = load_tiny(checkpoint)
        worker = Worker(lambda: llm)
        early, late = (Job([[1]], [SamplingParams(max_tokens=3)]) for _ in range(2))
        worker.submit(early)
        worker.cancel(early)
        worker.submit(late)
        worker.start()
        assert sum([len(pieces) async for pieces in late.pieces()]) == 3
        worker.cancel(late)
        await asyncio.to_thread(worker.stop)
        return llm

    llm = asyncio.run(run())
    assert not llm.engine.has_work
    assert llm.arena.num_free == llm.arena.num_pages


def test_steps_that_are_not_replayed_are_said_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        worker = Worker(lambda: load_tiny(checkpoint, kv_dtype="rot4+16"))
        worker.start()
        for _ in range(2):
            job = Job([[1, 2, 3]], [SamplingParams(max_tokens=6, ignore_eos=True)])
            worker.submit(job)
            assert sum([len(pieces) async for pieces in job.pieces()]) == 6
        await asyncio.to_thread(worker.stop)

    asyncio.run(run())
    assert [record.message for record in caplog.records if "replayed" in record.message] == [
        "slower than it could be: decode steps are not replayed (the model asks for the step's spans)"
    ]


def test_a_job_is_taken_whole_or_not_at_all(checkpoint: Path) -> None:
    async def submit() -> LLM:
        llm = load_tiny(checkpoint)
        worker = Worker(lambda: llm)
        job = Job([[1], [2], [10**9]], [SamplingParams(max_tokens=20_000, ignore_eos=True)] * 3)
        worker.submit(job)
        worker.start()
        with pytest.raises(ApiError, match="outside the vocabulary"):
            await job.accepted()
        assert not llm.engine.has_work
        await asyncio.to_thread(worker.stop)
        return llm

    llm = asyncio.run(submit())
    assert llm.arena.num_free == llm.arena.num_pages


def test_a_refusal_that_comes_before_it_is_waited_for_is_not_an_acceptance() -> None:
    async def refuse() -> None:
        job = Job([[1]], [SamplingParams()])
        job.post(error=ApiError(400, "no"))
        await asyncio.sleep(0)
        await job.accepted()

    with pytest.raises(ApiError, match="no"):
        asyncio.run(refuse())


def test_a_crowd_that_does_not_fit_and_partly_leaves(checkpoint: Path, reference: LLM) -> None:
    """Preempted, cancelled, queued and finished side by side: who stays gets exactly the text that it gets alone."""
    lengths = [40 + 23 * (index % 7) for index in range(24)]

    def visit(server: Server, index: int) -> str | None:
        fields = {**LONG_SDK, "prompt": f"visitor {index} " * (1 + index % 5), "max_tokens": lengths[index]}
        stream = server.client.completions.create(**fields, stream=True)
        if index % 3 == 0:
            for _, _ in zip(range(index), stream, strict=False):
                pass
            stream.close()
            return None
        return "".join(chunk.choices[0].text for chunk in stream)

    with serving(lambda: load_tiny(checkpoint, max_context=512, max_sequences=8, kv_memory=300_000)) as server:
        server.wait_until_loaded()
        with ThreadPoolExecutor(24) as pool:
            texts = list(pool.map(lambda index: visit(server, index), range(24)))
        server.assert_idle()
        assert server.llm.engine.scheduler.num_preemptions > 0
    for index, text in enumerate(texts):
        if text is not None:
            params = SamplingParams(temperature=0, max_tokens=lengths[index], ignore_eos=True)
            assert text == reference.generate([f"visitor {index} " * (1 + index % 5)], params)[0].outputs[0].text


class Failure:
    """Makes the model raise once, from its own forward pass."""

    def __init__(self, llm: LLM):
        self._handle = llm.model.register_forward_pre_hook(self._raise)

    def _raise(self, *_: Any) -> None:
        self._handle.remove()
        raise RuntimeError("secret: /home/someone/model.safetensors")


def test_a_failing_step_fails_its_requests_and_nothing_else(narrow: Server) -> None:
    """The one that runs is answered with an error; the one that waits is answered."""
    with ThreadPoolExecutor(2) as pool:
        start_gate = threading.Event()
        narrow.llm.model.register_forward_pre_hook(lambda *_: start_gate.wait(30) and None)
        broken = pool.submit(narrow.client.completions.create, **{**LONG_SDK, "max_tokens": 500})
        eventually(lambda: len(narrow.llm.engine.scheduler.running) == 1, "running")
        queued = pool.submit(narrow.client.completions.create, **SHORT)
        eventually(lambda: narrow.num_requests == 2, "queueing")
        Failure(narrow.llm)
        start_gate.set()
        with pytest.raises(openai.InternalServerError) as caught:
            broken.result()
        assert queued.result().choices[0].finish_reason == "length"
    assert "secret" not in str(caught.value.body)
    assert "secret" not in caught.value.message
    narrow.assert_idle()
    assert narrow.http.get("/health").status_code == 200


def test_a_failure_in_the_middle_of_a_stream_is_an_event(server: Server) -> None:
    stream = iter(server.client.completions.create(**LONG_SDK, stream=True))
    next(stream)
    Failure(server.llm)
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(stream)


def test_a_failing_tokenizer_fails_its_request_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> list[int]:
        raise RuntimeError("secret")

    monkeypatch.setattr(server.llm.tokenizer, "encode", broken)
    answer = server.http.post("/v1/completions", json=SHORT)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


def test_while_the_model_loads(checkpoint: Path) -> None:
    loaded = threading.Event()
    with serving(lambda: loaded.wait(30) and load_tiny(checkpoint)) as server:
        assert server.http.get("/health").status_code == 503
        answer = server.http.post("/v1/completions", json=SHORT)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["code"] == "loading"
        loaded.set()
        server.wait_until_loaded()
        assert server.http.get("/health").status_code == 200
        assert server.http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_model_that_cannot_be_loaded() -> None:
    def load() -> LLM:
        raise CheckpointError("no such file")

    with serving(load) as server:
        eventually(lambda: server.worker.failure, "failing")
        assert isinstance(server.worker.failure, CheckpointError)
        assert server.http.get("/health").json() == {"status": "failed"}
        assert server.http.post("/v1/completions", json=SHORT).status_code == 503


def test_stopping_the_server_cancels_what_runs(checkpoint: Path) -> None:
    with serving(lambda: load_tiny(checkpoint)) as server:
        server.wait_until_loaded()
        server.uvicorn.config.timeout_graceful_shutdown = 0
        socks = start(server, 2) + start(server, 2, stream=True)
        llm = server.llm
    assert not llm.engine.has_work
    assert llm.arena.num_free == llm.arena.num_pages
    for sock in socks:
        assert b"[DONE]" not in read_to_end(sock)
        sock.close()


def test_a_base_model_has_no_chat(tmp_path: Path) -> None:
    with serving(lambda: load_tiny(tiny_llama(tmp_path, chat_template=None))) as server:
        server.wait_until_loaded()
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            server.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
        assert server.client.completions.create(**SHORT).choices


def test_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    """A model that samples gives different texts; a request can still ask for the most probable one."""
    config = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    with serving(lambda: load_tiny(tiny_llama(tmp_path, generation_config=config))) as server:
        server.wait_until_loaded()
        ask = {"model": MODEL, "prompt": "x", "max_tokens": 30}
        assert len({server.client.completions.create(**ask).choices[0].text for _ in range(4)}) > 1
        assert len({server.client.completions.create(**ask, temperature=0).choices[0].text for _ in range(4)}) == 1


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(checkpoint: Path) -> None:
    with serving(lambda: load_tiny(checkpoint, max_context=256, kv_memory=400_000)) as server:
        server.wait_until_loaded()
        with pytest.raises(openai.BadRequestError, match="the arena has"):
            server.client.completions.create(**{**SHORT, "max_tokens": 250}, n=60)
        server.assert_idle()

"""The engine: whatever runs beside a sequence, and however often it is interrupted, its tokens stay and its pages come back."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare.cache.arena import Arena
from kvshare.cache.step import DenseStep
from kvshare.engine.engine import Engine
from kvshare.engine.outputs import RequestOutput
from kvshare.engine.sampling import SamplingParams
from kvshare.errors import CapacityError, RequestError
from kvshare.models.llama import Llama

MODEL = tiny.model()
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def engine(pages: int = 400, chunk: int = 16, max_sequences: int = 8, model: Llama = MODEL) -> Engine:
    arena = Arena(pages, model.layout.page_bytes("fp32"))
    return Engine(model, tiny.LetterTokenizer(), arena, "fp32", tiny.CONTEXT, chunk, max_sequences)  # pyright: ignore[reportArgumentType]


def finish(run: Engine, *ids: int) -> list[RequestOutput]:
    requests = [run.requests[i] for i in ids]
    while run.has_work:
        run.step()
        run.arena.check_integrity()
    assert run.arena.num_free == run.arena.num_pages
    return [request.output() for request in requests]


def prompt(seed: int, size: int) -> list[int]:
    return torch.randint(3, tiny.VOCAB, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def greedy_without_cache(tokens: list[int], count: int) -> list[int]:
    """The oracle: every token by a whole forward pass over dense tensors."""
    tokens = list(tokens)
    for _ in range(count):
        hidden = MODEL(torch.tensor(tokens), DenseStep(MODEL.layout, [len(tokens)]))
        tokens.append(int(MODEL.logits(hidden[-1:]).argmax()))
    return tokens[-count:]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_interleaving_keeps_tokens_and_pages(data: st.DataObject) -> None:
    """Add, step, cancel in any order, in an arena too small for all: pages add up and every finished output is what it is alone."""
    run = engine(pages=data.draw(st.integers(14, 40)), chunk=data.draw(st.sampled_from([3, 16])), max_sequences=4)
    alive: dict[int, tuple[list[int], int]] = {}
    requests = {}
    for step in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "cancel"]))
        if action == "add":
            tokens, count = prompt(step, data.draw(st.integers(1, 60))), data.draw(st.integers(1, 12))
            try:
                request_id = run.add(tokens, SamplingParams(max_tokens=count, **GREEDY))
            except CapacityError:
                continue
            alive[request_id], requests[request_id] = (tokens, count), run.requests[request_id]
        elif action == "cancel" and alive:
            request_id = data.draw(st.sampled_from(sorted(alive)))
            run.cancel(request_id)
            alive.pop(request_id)
        else:
            run.step()
        run.arena.check_integrity()
        held = {page for request in run.requests.values() for s in request.sequences for t in s.cache.tables.values() for page in t.pages}
        assert run.arena.num_held == len(held)
        assert run.arena.num_held + run.arena.num_free == run.arena.num_pages
    finish(run)
    for request_id, (tokens, count) in alive.items():
        (output,) = requests[request_id].output().outputs
        assert output.token_ids == greedy_without_cache(tokens, count)


def test_preemption_computes_the_same_tokens_again() -> None:
    prompts = [prompt(seed, 40) for seed in range(4)]
    run = engine(pages=26)
    outputs = finish(run, *[run.add(p, SamplingParams(max_tokens=60, **GREEDY)) for p in prompts])
    assert run.scheduler.num_preemptions > 0
    for tokens, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_without_cache(tokens, 60)


def test_a_request_that_can_never_fit_is_refused_at_once_with_the_numbers() -> None:
    run = engine(pages=12)
    with pytest.raises(CapacityError, match=r"1 x 200 tokens need [\d,]+ bytes of cache, but the arena has [\d,]+: up to \d+ tokens fit"):
        run.add(prompt(0, 150), SamplingParams(max_tokens=50))
    assert not run.has_work
    fits = run.policy.longest_context()
    finish(run, run.add(prompt(0, fits - 5), SamplingParams(max_tokens=5, **GREEDY)))


def test_prompts_outside_context_and_vocabulary_are_refused() -> None:
    run = engine()
    wrong = (([], "empty"), ([tiny.VOCAB], "outside the vocabulary of 64"), (prompt(0, tiny.CONTEXT), "the prompt has 256 tokens"))
    for tokens, message in wrong:
        with pytest.raises(RequestError, match=message):
            run.add(tokens, SamplingParams())
    with pytest.raises(RequestError, match="at most 56 can follow"):
        run.add(prompt(0, 200), SamplingParams(max_tokens=57))


def test_seeded_samples_do_not_depend_on_who_runs_beside() -> None:
    params = SamplingParams(seed=7, max_tokens=12, ignore_eos=True)
    alone = engine()
    (expected,) = finish(alone, alone.add(prompt(1, 9), params))
    crowd = engine(chunk=5)
    others = [crowd.add(prompt(seed, 30), SamplingParams(max_tokens=20, ignore_eos=True)) for seed in range(3)]
    (output, *_) = finish(crowd, crowd.add(prompt(1, 9), params), *others)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_several_completions_share_the_prompt_and_differ() -> None:
    run = engine()
    request_id = run.add(prompt(2, 60), SamplingParams(n=3, seed=5, max_tokens=10, ignore_eos=True))
    request = run.requests[request_id]
    while not request.sequences[0].output.token_ids:
        run.step()
    shared = run.arena.num_held
    assert shared < 2 * run.model.layout.held_pages(60, "fp32")
    (output,) = finish(run, request_id)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    singly = engine()
    for index, completion in enumerate(output.outputs):
        (single,) = finish(singly, singly.add(prompt(2, 60), SamplingParams(seed=5 + index, max_tokens=10, ignore_eos=True)))
        assert single.outputs[0].token_ids == completion.token_ids


def test_prompt_logprobs_equal_a_dense_pass_and_switch_the_skipped_tail_off() -> None:
    tokens = prompt(3, 75)
    run = engine(chunk=16)
    (output,) = finish(run, run.add(tokens, SamplingParams(max_tokens=1, prompt_logprobs=2, **GREEDY)))
    with torch.no_grad():
        dense = MODEL.logits(MODEL(torch.tensor(tokens), DenseStep(MODEL.layout, [75]))).log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == 75
    for place, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry is not None
        assert entry[tokens[place]].logprob == pytest.approx(dense[place - 1, tokens[place]].item(), abs=1e-4)
    assert output.metrics is not None
    assert output.metrics.tail_rows_skipped == 0


def test_metrics_state_plan_held_and_skipped_rows() -> None:
    run = engine(chunk=16)
    (output,) = finish(run, run.add(prompt(3, 75), SamplingParams(max_tokens=4, **GREEDY)))
    metrics, layout = output.outputs[0].metrics, MODEL.layout
    assert metrics is not None
    assert metrics.planned_bytes == metrics.held_bytes == layout.held_bytes(78, 1, "fp32")
    assert metrics.held_bytes <= metrics.peak_bytes <= layout.peak_bytes(78, 1, "fp32", chunk=16)
    assert (metrics.prompt_rows, metrics.tail_rows_skipped) == (75, 74)
    assert metrics.kv_bytes == layout.bytes(78, 1, "fp32") < metrics.kv_bytes_without_sharing_and_windows


def test_the_head_never_sees_more_than_64_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny.model(), []
    original = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(len(hidden)) or original(hidden))
    run = engine(chunk=256, model=model)
    finish(run, run.add(prompt(4, 200), SamplingParams(max_tokens=2, prompt_logprobs=0, **GREEDY)))
    assert max(rows) == 64
    assert sum(rows) == 199 + 2


def test_stop_strings_and_tokens_end_a_text_where_they_should() -> None:
    run = engine()
    (free,) = finish(run, run.add(prompt(5, 10), SamplingParams(max_tokens=12, **GREEDY)))
    text, ids = free.outputs[0].text, free.outputs[0].token_ids
    stop = text[5:7]
    (stopped,) = finish(run, run.add(prompt(5, 10), SamplingParams(max_tokens=12, stop=(stop,), **GREEDY)))
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    (ended,) = finish(run, run.add(prompt(5, 10), SamplingParams(max_tokens=12, stop_token_ids=(ids[4],), **GREEDY)))
    assert ended.outputs[0].token_ids == ids[: ids.index(ids[4]) + 1]
    assert ended.outputs[0].stop_reason == ids[4]
    assert free.outputs[0].finish_reason == "length"


def test_the_end_token_stops_unless_it_is_ignored() -> None:
    with torch.no_grad():
        model = tiny.model()
        model.embedding.weight[1] = model.embedding.weight[1:].mean(0) + model.norm.weight * 3  # a likely end token
    run = engine(model=model)
    params = {"max_tokens": 200, "seed": 0, "temperature": 1.5}
    (ended,) = finish(run, run.add(prompt(5, 10), SamplingParams(**params)))
    assert ended.outputs[0].token_ids[-1] == 1
    assert ended.outputs[0].finish_reason == "stop"
    (ignored,) = finish(run, run.add(prompt(5, 10), SamplingParams(ignore_eos=True, **params)))
    assert len(ignored.outputs[0].token_ids) == 200


def test_updates_joined_are_the_text() -> None:
    run = engine()
    ids = [run.add(prompt(seed, 12), SamplingParams(max_tokens=20, stop=("never this",), **GREEDY)) for seed in range(3)]
    outputs, pieces = {i: run.requests[i] for i in ids}, dict.fromkeys(ids, "")
    while run.has_work:
        for update in run.step():
            pieces[update.request_id] += update.text
    assert all(pieces[i] == outputs[i].output().outputs[0].text != "" for i in ids)


def test_cancel_frees_pages_at_once_queued_or_running() -> None:
    run = engine(max_sequences=1)
    running, queued = (run.add(prompt(seed, 50), SamplingParams(max_tokens=50, **GREEDY)) for seed in range(2))
    for _ in range(6):
        run.step()
    for request_id in (queued, running):
        output = run.cancel(request_id)
        assert output is not None
        assert output.outputs[0].finish_reason == "abort"
    assert run.arena.num_free == run.arena.num_pages
    assert not run.has_work
    assert run.cancel(running) is None


def test_an_arena_planned_for_a_batch_runs_that_batch() -> None:
    """Sequences behind their prompts hold no chunk beside their windows: they must not keep the others waiting."""
    tokens, batch, chunk = 120, 6, 32
    run = engine(MODEL.layout.peak_pages(tokens, batch, "fp32", chunk), chunk)
    for seed in range(batch):
        run.add(prompt(seed, 80), SamplingParams(max_tokens=40, **GREEDY))
    most = 0
    while run.has_work:
        run.step()
        most = max(most, len(run.scheduler.running))
    assert most == batch
    assert run.scheduler.num_preemptions == 0

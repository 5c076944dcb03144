"""The engine as users run it: several requests in one batch, completions that share a prompt, one that is cancelled."""

from __future__ import annotations

from collections.abc import Sequence

from kvshare.doctor.comparison import TIE_BOUND
from kvshare.doctor.report import Check
from kvshare.engine.llm import LLM
from kvshare.engine.outputs import CompletionOutput
from kvshare.engine.sampling import SamplingParams

NAMES = ("engine: batch = alone", "engine: pages")
NEW_TOKENS = 12
LOGPROBS = 5


def serving_checks(llm: LLM, ids: Sequence[int], num_begin: int, dtype: str) -> list[Check]:
    """Greedy answers to three prompts, alone and together, and what the arena held. `ids[:num_begin]` is <bos>, if a text needs one."""
    third = max(4, min(len(ids), llm.max_context - NEW_TOKENS) // 3)
    prompts = [list(ids[:third]), list(ids[: 2 * third]), [*ids[:num_begin], *ids[third : third + max(2, third // 2)]]]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=LOGPROBS)
    alone = [llm.generate(prompt, params)[0].outputs[0] for prompt in prompts]
    cancelled = llm.engine.add(prompts[1], params)
    llm.engine.step()
    llm.engine.cancel(cancelled)
    twice = SamplingParams(n=2, temperature=1.0, seed=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    together = llm.generate([*prompts, prompts[0]], [params] * len(prompts) + [twice])
    steps = llm.engine.runner.decode_steps.describe()
    return [_tokens_check(alone, [output.outputs[0] for output in together[:-1]], dtype, steps), _pages_check(llm, alone, dtype)]


def _tokens_check(alone: Sequence[CompletionOutput], together: Sequence[CompletionOutput], dtype: str, steps: str) -> Check:
    name, equal, ties = NAMES[0], 0, 0
    for one, other in zip(alone, together, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b), None)
        if place is None:
            equal += 1
            continue
        assert one.logprobs is not None
        there = one.logprobs[place]
        rival = there.get(other.token_ids[place])
        if dtype != "float32" and rival and there[one.token_ids[place]].logprob - rival.logprob <= _tie(dtype):
            ties += 1
            continue
        return Check(
            name, dtype, "failed", f"an answer in a batch leaves the one that it gets alone at token {place + 1}, with no tie there"
        )
    answers = f"{equal} of {len(alone)} greedy answers equal" + (f", {ties} part at a near tie" if ties else "")
    return Check(name, dtype, "passed", f"{answers}; beside a cancelled request and one with two answers; {steps}")


def _tie(dtype: str) -> float:
    """In nats, for logits of some tens: what `TIE_BOUND` allows a logit of 32."""
    return 32 * TIE_BOUND[dtype]


def _pages_check(llm: LLM, outputs: Sequence[CompletionOutput], dtype: str) -> Check:
    name = NAMES[1]
    for output in outputs:
        metrics = output.metrics
        assert metrics is not None
        if metrics.planned_bytes != metrics.held_bytes:
            return Check(name, dtype, "failed", f"{metrics.held_bytes:,} bytes were held, planned were {metrics.planned_bytes:,}")
    if llm.arena.num_held:
        return Check(name, dtype, "failed", f"{llm.arena.num_held} pages are held although no request runs")
    try:
        llm.arena.check_integrity()
    except AssertionError as error:
        return Check(name, dtype, "failed", str(error))
    return Check(name, dtype, "passed", f"planned = held for each answer; all {llm.arena.num_pages:,} pages came back")

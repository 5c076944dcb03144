"""A prompt of 32,768 tokens on a model with Gemma 4's structure stays within the plan."""

from __future__ import annotations

from kvshare import LLM, SamplingParams
from kvshare.demo import sample_text


def test_a_prompt_of_32768_tokens_prefills_within_peak_bytes() -> None:
    context = 32_768
    llm = LLM("demo", max_context=context + 8, max_sequences=1, progress=False)
    text = llm.tokenizer.encode(sample_text())
    prompt = (text * (context // len(text) + 1))[:context]
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    metrics, cached = output.metrics, context + 1
    assert metrics is not None
    assert metrics.held_bytes == llm.layout.held_bytes(cached)
    assert metrics.held_bytes < llm.arena.peak_bytes <= llm.layout.peak_bytes(cached, chunk=512)
    assert metrics.tail_rows_skipped == context - 1
    everything = llm.layout.without_sharing().without_windows().bytes(cached)
    assert llm.arena.peak_bytes < 0.3 * everything

"""vLLM on a CPU, with the flag that skips a prompt's rows behind the last owner. VLLM_PYTHON names an interpreter that has it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines import serve
from benchmarks.engines.decodes import ATTEMPTS, decodes


def run(model: str, points: list[list[int]], decode: int, dtype: str, eager: bool) -> Iterator[dict[str, Any]]:
    """Its step loop, in this process: a pool of 2 GiB (VLLM_CPU_KVCACHE_SPACE), no prefix cache, chunks as long as it chooses."""
    threads = int(os.environ["OMP_NUM_THREADS"])
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    from vllm import LLM, SamplingParams

    longest, sequences = max(context for context, _ in points) + ATTEMPTS * decode + 8, max(batch for _, batch in points)
    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=longest,
        max_num_seqs=sequences,
        enable_prefix_caching=False,
        enforce_eager=eager,
        kv_sharing_fast_prefill=True,
        skip_tokenizer_init=not Path(model, "tokenizer.json").exists(),
        disable_log_stats=True,
    )
    engine, draw = llm.llm_engine, random.Random(0)
    vocabulary = llm.model_config.get_vocab_size()

    def measure(context: int, batch: int, decode: int) -> dict[str, Any]:
        # sequences whose prompts were read first decode meanwhile: room for that, as kvshare's run has it
        params = SamplingParams(temperature=0, max_tokens=longest - context - 1, ignore_eos=True, detokenize=False)
        counts: dict[str, int] = {}
        begun = time.perf_counter()
        for number in range(batch):
            ids = [draw.randrange(300, vocabulary) for _ in range(context)]
            engine.add_request(name := f"{context}-{batch}-{number}-{begun}", {"prompt_token_ids": ids}, params)
            counts[name] = 0

        def step() -> None:
            for output in engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)

        while not all(counts.values()):
            step()
        first = time.perf_counter()

        def steps() -> float:
            begun, before = time.perf_counter(), sum(counts.values())
            while sum(counts.values()) < before + decode * batch and engine.has_unfinished_requests():
                step()
            return (time.perf_counter() - begun) * batch / (sum(counts.values()) - before)

        around = decodes(steps)
        engine.abort_request(list(counts))
        while engine.has_unfinished_requests():
            engine.step()
        return {"context": context, "batch": batch, "ttft_s": first - begun, **around}

    measure(32, 1, 2)
    yield {"ready": True}
    for context, batch in points:
        yield measure(context, batch, decode)


if __name__ == "__main__":
    serve(run)

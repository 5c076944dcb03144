"""One engine at a time, in a process of its own: `python -m benchmarks.engines ENGINE MODEL SPEC`, SPEC and result as JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def run_kvshare(model: str, contexts: list[int], decode: int, batch: int, dtype: str, weights: str = "auto") -> list[dict[str, Any]]:
    import torch

    from kvshare import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, weights=weights, max_context=max(contexts) + decode + 8, max_sequences=batch, progress=False)
    params = SamplingParams(temperature=0, max_tokens=decode + 1, ignore_eos=True)
    llm.generate([[5] * 64], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    rows = []
    for context in contexts:
        prompts = torch.randint(5, llm.model.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0)).tolist()
        llm.arena.reset_peak()
        ids, begun = [llm.engine.add(prompt, params) for prompt in prompts], time.perf_counter()
        requests = [llm.engine.requests[i] for i in ids]
        while not all(request.sequences[0].output.token_ids for request in requests):
            llm.engine.step()
        first = time.perf_counter()
        done = sum(len(request.sequences[0].output.token_ids) for request in requests)
        while llm.engine.has_work:
            llm.engine.step()
        total = sum(len(request.sequences[0].output.token_ids) for request in requests)
        rows.append(_row(context, batch, first - begun, time.perf_counter() - first, total - done, llm.arena.peak_bytes))
    return rows


def run_transformers(model: str, contexts: list[int], decode: int, batch: int, dtype: str) -> list[dict[str, Any]]:
    """The forward passes of `generate` without its bookkeeping, which flatters transformers a little."""
    import torch
    import transformers

    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    vocabulary = lm.config.get_text_config().vocab_size
    rows = []
    with torch.inference_mode():
        for parameter in lm.parameters():  # out of the page cache into memory of its own, as kvshare's fused weights are
            parameter.data = parameter.data.clone()
        lm.tie_weights()
        lm(torch.full((1, 64), 5), logits_to_keep=1)
        for context in contexts:
            ids = torch.randint(5, vocabulary, (batch, context), generator=torch.Generator().manual_seed(0))
            cache, begun = transformers.DynamicCache(config=lm.config), time.perf_counter()
            token = lm(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(decode):
                token = lm(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            rows.append(_row(context, batch, first - begun, time.perf_counter() - first, decode * batch, sum(held.values())))
    return rows


def run_llama_cpp(model: str, contexts: list[int], decode: int, batch: int, dtype: str) -> list[dict[str, Any]]:
    """`llama-bench`, found on PATH or in LLAMA_BENCH: prompts of each length, then tokens decoded behind each of them."""
    if batch != 1:
        raise SystemExit("llama-bench decodes one sequence")
    program = [
        os.environ.get("LLAMA_BENCH", "llama-bench"),
        "-m",
        model,
        "-t",
        os.environ["OMP_NUM_THREADS"],
        "-r",
        "2",
        "-fa",
        "1",
        "-o",
        "json",
    ]
    rows = []
    for context in contexts:
        speeds = {}
        for kind, arguments in (
            ("prefill", ["-p", str(context), "-n", "0"]),
            ("decode", ["-p", "0", "-n", str(decode), "-d", str(context)]),
        ):
            done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=True)
            speeds[kind] = json.loads(done.stdout)[0]["avg_ts"]
        rows.append(_row(context, 1, context / speeds["prefill"], decode / speeds["decode"], decode, 0))
    return rows


def peak_rss() -> int:
    """Most memory this process has held, mapped files included. (`getrusage` would count what the parent held before it started us.)"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _row(context: int, batch: int, ttft: float, decode_seconds: float, decoded: int, cache_bytes: int) -> dict[str, Any]:
    return {
        "context": context,
        "batch": batch,
        "ttft_s": ttft,
        "prefill_tok_s": batch * context / ttft,
        "decode_tok_s": decoded / decode_seconds,
        "cache_bytes": cache_bytes,
        "peak_rss_bytes": peak_rss(),
    }


ENGINES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "kvshare": run_kvshare,
    "kvshare-bf16": partial(run_kvshare, weights="bf16"),
    "kvshare-torch": partial(run_kvshare, weights="bf16"),  # and without the native kernels
    "kvshare-int8": partial(run_kvshare, weights="int8"),
    "kvshare-int4": partial(run_kvshare, weights="int4"),
    "transformers": run_transformers,
    "llama.cpp": run_llama_cpp,
}

if __name__ == "__main__":
    if sys.argv[1] == "kvshare-torch":
        os.environ["KVSHARE_KERNELS"] = "0"
    for row in ENGINES[sys.argv[1]](sys.argv[2], **json.loads(sys.argv[3])):
        print(json.dumps(row), flush=True)

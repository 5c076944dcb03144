"""transformers: the forward passes of `generate` without its bookkeeping, which flatters it a little."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.engines import serve
from benchmarks.engines.decodes import decodes


def run(model: str, points: list[list[int]], decode: int, dtype: str) -> Iterator[dict[str, Any]]:
    import torch
    import transformers

    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    vocabulary = lm.config.get_text_config().vocab_size
    with torch.inference_mode():
        for name, parameter in lm.named_parameters():
            # out of the page cache into memory of its own, as kvshare's fused weights are; both leave per-layer tables mapped
            if "embed_tokens_per_layer" not in name:
                parameter.data = parameter.data.clone()
        lm.tie_weights()
        lm(torch.full((1, 64), 5), logits_to_keep=1)
        yield {"ready": True}
        for context, batch in points:
            ids = torch.randint(5, vocabulary, (batch, context), generator=torch.Generator().manual_seed(context))
            cache, begun = transformers.DynamicCache(config=lm.config), time.perf_counter()
            token = lm(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            first = time.perf_counter()

            def steps(token: Any = token, cache: Any = cache) -> float:
                begun = time.perf_counter()
                for _ in range(decode):
                    token = lm(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                return (time.perf_counter() - begun) / decode

            around = decodes(steps)
            tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
            held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
            yield {"context": context, "batch": batch, "ttft_s": first - begun, **around, "held_bytes": held}


if __name__ == "__main__":
    serve(run)

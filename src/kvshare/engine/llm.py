"""`LLM`: a model, its arena and an engine behind the call that people know from vLLM's offline API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.block_encoding import PRECISIONS
from kvshare.checkpoints.block_layers import has_blocks
from kvshare.checkpoints.progress import Progress, ignore, progress_bar, say
from kvshare.checkpoints.quantized_weights import quantize
from kvshare.checkpoints.resident import ResidentMemory, forget_pages
from kvshare.checkpoints.weights import load_weights
from kvshare.engine.engine import Engine
from kvshare.engine.outputs import RequestOutput, Update
from kvshare.engine.sampling import SamplingParams
from kvshare.errors import CapacityError, RequestError
from kvshare.kernels.quantized_weight import LARGEST_Q, ActivationWidth
from kvshare.layout import CacheLayout, PrecisionChoice
from kvshare.layout.precision import read_precision
from kvshare.models import build_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ("auto", "native", "bf16", *PRECISIONS)
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ARENA_SHARE = 0.5  # of the memory that is free when the weights are loaded

Prompt = str | SequenceOf[int]


class LLM:
    """A loaded model.

    `where`: a directory, a `.gguf` file, a hub name, or the short name of weights in an installed package.
    `dtype`: "auto" (bfloat16 unless the checkpoint is float32), "bfloat16", "float16" or "float32".
    `max_context`: tokens a sequence may have; by default the model's own limit, or less if the memory does not hold that.
    `kv_memory`: bytes for the cache; by default what `max_sequences` sequences of `max_context` need, at most half of the free memory.
    `chunk`: tokens that one step computes at most; bounds the memory of a long prompt's prefill.
    `weights`: "native" keeps the quantized blocks of a GGUF file and multiplies with them, "bf16" widens them; "int8" and "int4" also
    quantize what is plain, experts, the per-layer table and the head included. "auto" is native where the kernels are built, and plain
    numbers in `dtype` where that is given as "float32" or "float16".
    `activations`: what rows of activations are rounded to where up to 48 of them meet quantized blocks, each 32 with a scale: "int16", or
    "int8", which multiplies three and more rows in up to half the time and costs as much accuracy as int8 weights, in some models
    several times as much.
    `weight_cache`: whether weights quantized at load are kept in the user's cache and mapped from there, the next time at once.
    `kv_layout`: how Gemma 4's K = V layers are stored: "plain", "compact" or "v-only".
    `kv_dtype`: precision of the cache: a name ("bf16", "int8", "int4", ...), one by owner's layer (-1 for the others), or the path of a
    JSON file that `kvshare tune` wrote; by default `dtype`'s own.

    Raises `CheckpointError`, `ConfigError` or `CapacityError` when the model cannot be loaded or held.
    """

    def __init__(
        self,
        where: str | Path,
        *,
        dtype: str = "auto",
        max_context: int | None = None,
        max_sequences: int = 16,
        kv_memory: int | None = None,
        chunk: int = 512,
        weights: str = "auto",
        weight_cache: bool = True,
        activations: ActivationWidth = "int16",
        kv_layout: str = "plain",
        kv_dtype: str | Path | Mapping[int, str] | None = None,
        progress: bool = True,
    ):
        checkpoint = open_checkpoint(where)
        self.origin = checkpoint.origin
        self.dtype = _choose_dtype(dtype, weights, checkpoint.config)
        keep_blocks = _keeps_blocks(weights, dtype)
        if activations not in LARGEST_Q:
            raise RequestError(f"activations: unknown {activations!r}: choose one of {', '.join(LARGEST_Q)}")
        self.activations: ActivationWidth = activations
        self.model = build_model(checkpoint.config, self.dtype, kv_layout).eval()
        own = _PRECISIONS[self.dtype]
        precision = own if kv_dtype is None else read_precision(kv_dtype, self.model.layout, own)

        def bar(title: str) -> AbstractContextManager[Progress | None]:
            return progress_bar(title) if progress else nullcontext()

        if weights in PRECISIONS:
            with bar(f"quantizing weights to {weights}") as report:
                checkpoint = quantize(
                    self.model, checkpoint, weights, cached=weight_cache, progress=report, notice=say if progress else ignore
                )
        with bar("loading weights") as report:
            resident = ResidentMemory()
            load_weights(self.model, checkpoint, self.dtype, report, keep_blocks, resident, activations)
        if activations == "int8" and not has_blocks(self.model):
            raise RequestError(
                "activations int8: only activations that meet quantized blocks are rounded, and there are none here: "
                "choose weights int8 or int4 or a GGUF file with native kernels, or leave activations away"
            )
        forget_pages()
        if progress and resident.refused_bytes:
            say(f"weights: {resident.refused_bytes / 1e9:,.2f} GB stay in the mapped file, for lack of free memory: decoding is slower")
        self.tokenizer = checkpoint.tokenizer()
        self.generation_config: Mapping[str, Any] = checkpoint.generation_config
        self.arena, self.max_context = _make_arena(self.model.layout, precision, max_context, max_sequences, kv_memory, chunk)
        self.engine = Engine(self.model, self.tokenizer, self.arena, precision, self.max_context, chunk, max_sequences)
        rows = self.engine.runner.cache.native_attention.read_by_torch(self.dtype)
        if progress and rows:
            remedy = f"dtype bfloat16 has kernels for them, as has this one for a kv_dtype without {rows} rows (fp32, or codes without +N)"
            say(f"attention: {str(self.dtype).removeprefix('torch.')} queries meet {rows} rows in plain torch, which is slow: {remedy}")

    @property
    def layout(self) -> CacheLayout:
        return self.model.layout

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's own sampling defaults with `overrides` (those that are not None) on top."""
        return SamplingParams.from_generation_config(self.generation_config, **overrides)

    def generate(
        self, prompts: Prompt | SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids) in one batch; outputs in the order of the prompts.

        One `SamplingParams` serves all prompts, or give one for each. Nothing runs if one of them is refused.
        """
        several = _as_list(prompts)
        each = list(params) if isinstance(params, SequenceOf) else [params or self.default_sampling_params()] * len(several)
        if len(each) != len(several):
            raise RequestError(f"{len(several)} prompts but {len(each)} sampling params: give one for all, or one for each")
        ids = self._add_all(several, each)
        requests = [self.engine.requests[request_id] for request_id in ids]
        try:
            while any(request_id in self.engine.requests for request_id in ids):
                self.engine.step()
        finally:
            self._cancel_all(ids)
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Update]:
        """Complete one prompt, yielding each update as it comes. Closing the iterator cancels the request."""
        request_id = self.engine.add(prompt, params or self.default_sampling_params())
        try:
            while request_id in self.engine.requests:
                yield from (update for update in self.engine.step() if update.request_id == request_id)
        finally:
            self.engine.cancel(request_id)

    def chat_prompt(self, messages: SequenceOf[Mapping[str, Any]], **template_arguments: Any) -> list[int]:
        """Token ids of a conversation ({"role", "content"} each) under the model's own chat template, ready for its answer."""
        return self.tokenizer.encode(self.tokenizer.render_chat(messages, **template_arguments), special=False)

    def _add_all(self, prompts: SequenceOf[Prompt], params: SequenceOf[SamplingParams]) -> list[int]:
        ids: list[int] = []
        try:
            for prompt, own in zip(prompts, params, strict=True):
                ids.append(self.engine.add(prompt, own))
        except Exception:
            self._cancel_all(ids)
            raise
        return ids

    def _cancel_all(self, ids: SequenceOf[int]) -> None:
        for request_id in ids:
            self.engine.cancel(request_id)


def _as_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and all(isinstance(p, int) for p in prompts)):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]


def _choose_dtype(name: str, weights: str, config: Mapping[str, Any]) -> torch.dtype:
    if name != "auto" and name not in DTYPES:
        raise RequestError(f"dtype: unknown {name!r}: choose auto, {', '.join(DTYPES)}")
    if weights == "bf16":
        if name not in ("auto", "bfloat16"):
            raise RequestError(f"weights bf16 are not computed with in {name}: leave one of the two away")
        return torch.bfloat16
    if name == "auto":
        return torch.float32 if config.get("dtype", config.get("torch_dtype")) == "float32" else torch.bfloat16
    return DTYPES[name]


def _keeps_blocks(weights: str, dtype: str) -> bool:
    """Whether weights that are quantized blocks stay so."""
    if weights not in WEIGHTS:
        raise RequestError(f"weights: unknown {weights!r}: choose one of {', '.join(WEIGHTS)}")
    if weights == "auto":
        return kernels.available() and dtype in ("auto", "bfloat16")
    if weights == "bf16":
        return False
    if not kernels.available():
        raise RequestError(f"weights {weights}: the native kernels are not there ({kernels.reason_unavailable()}): choose bf16")
    if dtype == "float16":
        raise RequestError(f"weights {weights}: the kernels compute in bfloat16 or float32, not in float16: choose another dtype")
    return True


def _make_arena(
    layout: CacheLayout, precision: PrecisionChoice, max_context: int | None, max_sequences: int, kv_memory: int | None, chunk: int
) -> tuple[Arena, int]:
    """The arena, and the context that one sequence can have in it."""
    page_bytes = layout.page_bytes(precision)
    wanted = max_context or layout.max_context or 8192
    budget = (kv_memory if kv_memory is not None else int(free_memory() * _ARENA_SHARE)) // page_bytes
    alone = layout.peak_pages(wanted, 1, precision, chunk)
    if alone > budget and max_context is not None:
        raise CapacityError(
            f"a context of {wanted:,} tokens needs {alone * page_bytes:,} bytes of cache, but {budget * page_bytes:,} are there: "
            "lower max_context or raise kv_memory"
        )
    while layout.peak_pages(wanted, 1, precision, chunk) > budget:
        wanted = wanted * 3 // 4
        if wanted < 1:
            raise CapacityError(f"not one token fits into {budget * page_bytes:,} bytes of cache: raise kv_memory")
    pages = budget if kv_memory is not None else min(budget, layout.peak_pages(wanted, max_sequences, precision, chunk))
    return Arena(pages, page_bytes), wanted


def free_memory() -> int:
    """Bytes that the system can hand out without swapping."""
    return psutil.virtual_memory().available

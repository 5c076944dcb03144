"""The examination of one model: which checks are made, in which dtype, on how many tokens."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvshare.checkpoints import Checkpoint, open_checkpoint
from kvshare.checkpoints.block_encoding import PRECISIONS
from kvshare.checkpoints.block_layers import has_blocks
from kvshare.checkpoints.resolve import locate
from kvshare.checkpoints.tokenizer import Tokenizer
from kvshare.demo import sample_text
from kvshare.doctor.losses import activations_check, cache_check, is_lossy, ways_bound, weights_check
from kvshare.doctor.oracle import oracle_check
from kvshare.doctor.pages import boundary_check
from kvshare.doctor.report import Check, Report
from kvshare.doctor.running import Ways, one_shot, plan_check, writes_check
from kvshare.doctor.serving import serving_checks
from kvshare.engine.llm import LLM, free_memory
from kvshare.errors import RequestError
from kvshare.evaluation.perplexity import perplexity
from kvshare.kernels.quantized_weight import ActivationWidth
from kvshare.layout import CacheLayout

LEAST_TOKENS, MOST_TOKENS = 128, 1100
BEHIND_WINDOW = 40  # tokens that are run behind the widest window that is crossed
_ROOM = 0.6  # of the free memory that float32 weights may fill

Notice = Callable[[str], None]
"""Called with what is being done, for people who wait."""


def examine(
    where: str | Path,
    *,
    dtype: str = "auto",
    text: str | None = None,
    num_tokens: int | None = None,
    kv_layout: str = "plain",
    weights: str = "auto",
    kv_dtype: str | None = None,
    weight_cache: bool = True,
    activations: ActivationWidth = "int16",
    notice: Notice = lambda _: None,
) -> Report:
    """Prove on the model itself that every way of running it is the same, that no reader writes, and that the plan is the allocation.

    `dtype` "auto" runs what is served (quantized blocks as they are), then float32 where its weights fit the memory; another runs alone.
    `weights`, `kv_dtype` and `activations` as in `LLM`: where they are given, only the dtype that is served is run, and what rounding does
    to the predictions is a check of its own, with a bound.
    `text` defaults to `sample_text()`, `num_tokens` to what crosses the model's windows, at most 1,100.
    Raises `RequestError` for a text that is too short, and whatever loading raises; a property that does not hold is a failed check.
    """
    if dtype == "float32" and (weights != "auto" or kv_dtype is not None or activations != "int16"):
        raise RequestError("float32 is held to equal logits, which rounded weights, caches and activations do not give: leave dtype away")
    path = locate(where)
    checkpoint = open_checkpoint(path)
    notice("loading the weights")
    llm = LLM(
        path,
        dtype=dtype,
        kv_layout=kv_layout,
        weights=weights,
        kv_dtype=kv_dtype,
        weight_cache=weight_cache,
        activations=activations,
        max_sequences=4,
        progress=False,
    )
    ids = text_tokens(llm.tokenizer, llm.layout, text or sample_text(), num_tokens)
    report = Report(llm.origin, len(ids))
    report.checks.append(boundary_check(llm.layout, llm.engine.precision))
    again = (
        dtype == "auto"
        and weights == "auto"
        and kv_dtype is None
        and activations == "int16"
        and llm.dtype != torch.float32
        and _num_parameters(checkpoint) * 4 < _ROOM * free_memory()
    )
    hidden = _examine_dtype(report, llm, ids, notice, None if again or weights in PRECISIONS else (checkpoint, path))
    if hidden is not None and has_blocks(llm.model):
        notice("the same with plain weights")
        report.checks.append(weights_check(llm.model, path, ids, hidden, llm.dtype, kv_layout, weights))
    if again:
        del llm
        notice("loading the weights as float32")
        llm = LLM(path, dtype="float32", kv_layout=kv_layout, max_sequences=4, progress=False)
        _examine_dtype(report, llm, ids, notice, (checkpoint, path))
    return report


def _examine_dtype(report: Report, llm: LLM, ids: Sequence[int], notice: Notice, oracle: tuple[Checkpoint, Path] | None) -> Tensor | None:
    """All checks that run the weights; those against transformers where `oracle` says which weights to give it.

    Returns hidden states [tokens, hidden] that no cache has rounded; None where the model broke.
    """
    dtype = str(llm.dtype).removeprefix("torch.")
    try:
        notice(f"{dtype}: in one step")
        num_begin = int(ids[0] == llm.tokenizer.bos_id)
        lossy = is_lossy(llm.layout, llm.engine.precision)
        ways = Ways(llm.model, ids, num_begin, dtype, llm.engine.precision, lossy)
        exact = one_shot(llm.model, ids) if lossy else ways.reference
        if lossy:
            report.checks.append(cache_check(llm.model, exact, ways.reference, llm.engine.precision, dtype))
        if llm.activations == "int8":
            report.checks.append(activations_check(ways, dtype))
        bound = ways_bound(llm.layout, llm.engine.precision, dtype, llm.activations)
        for name, difference, remark in ways.checks():
            report.checks.append(difference.check(name, dtype, remark, bound))
            notice(f"{dtype}: behind {name}")
        report.checks += [writes_check(ways), plan_check(ways)]
        notice(f"{dtype}: the engine")
        report.checks += serving_checks(llm, ids, num_begin, dtype)
        if oracle is not None:
            report.perplexity = perplexity(llm.model, [ids]).perplexity
            notice(f"{dtype}: transformers")
            report.checks.append(oracle_check(llm.model, *oracle, ids, exact, llm.dtype, dtype))
        return exact
    except Exception as error:  # a model that breaks while it runs has failed the examination
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        report.checks.append(Check("runs to the end", dtype, "failed", f"{type(error).__name__}: {error} ({where})"))
        return None


def text_tokens(tokenizer: Tokenizer, layout: CacheLayout, text: str, num_tokens: int | None) -> list[int]:
    """The tokens to run: by default enough to leave the widest window behind, where that is not too far away.

    Raises `RequestError` for fewer than 16 tokens, more than the context, or more than the text has.
    """
    ids = tokenizer.encode(text)
    edges = [stream.window * stream.tokens_per_row for layer in layout.layers for stream in layer.streams if stream.window]
    reached = [edge + BEHIND_WINDOW for edge in edges if edge + BEHIND_WINDOW <= MOST_TOKENS]
    limit = min(len(ids), layout.max_context or len(ids))
    wanted = num_tokens if num_tokens is not None else min(limit, max([LEAST_TOKENS, *reached]))
    if not 16 <= wanted <= limit:
        raise RequestError(
            f"{wanted:,} tokens cannot be examined: from 16 to {limit:,} (the text has {len(ids):,}, bounded by the context)"
        )
    return ids[:wanted]


def _num_parameters(checkpoint: Checkpoint) -> int:
    return sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names())

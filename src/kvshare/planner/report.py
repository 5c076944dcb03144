"""What a model's cache and weights cost at one context, batch and precision, and what fits a memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from kvshare.errors import CapacityError, ConfigError
from kvshare.layout import CacheLayout, PrecisionChoice, layout_from_config
from kvshare.layout.config import Fields, text_config
from kvshare.layout.precision import describe_precision, read_precision
from kvshare.planner.models import ModelConfig, resolve
from kvshare.planner.parameters import Parameters, count_parameters

DEFAULT_CONTEXT = 131_072
DEFAULT_CHUNK = 512  # rows of a prompt that one step computes: what the engine does

WEIGHT_BITS: Mapping[str, Fraction] = {"bf16": Fraction(16), "int8": Fraction(17, 2), "int4": Fraction(9, 2)}
"""Bits a weight; 8 and 4 bits with a 16-bit scale for each 32 weights, as GGUF's Q8_0 and Q4_0 store them."""

UNBOUNDED = 1 << 40  # where a search for the longest context or the largest batch gives up


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of the weights at one precision. `per_layer_table_bytes` can stay on disk and are not part of `bytes`."""

    precision: str
    parameters: Parameters
    bytes: int
    per_layer_table_bytes: int


@dataclass(frozen=True, slots=True)
class Without:
    """The cache of the same model if readers stored rows of their own, if windows kept all rows, or both."""

    sharing: int
    windows: int
    both: int


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The report on one model. Bytes are integers; `weights` is None for families whose weights are not counted."""

    model: ModelConfig
    layout: CacheLayout
    context: int
    batch: int
    kv_dtype: PrecisionChoice
    kv_layout: str
    kv_bytes: Mapping[str, int]  # by kind, and "total"
    held_bytes: int  # whole pages, between steps
    peak_bytes: int  # inside a step: what a server must have
    without: Without
    bytes_per_token: Fraction  # of context, at the margin, for one sequence
    read_bytes: int  # cached bytes that one decode step of the batch reads
    weights: Weights | None
    memory: int | None
    max_context: int | None  # longest context at this batch that fits `memory`, at most the model's own limit; None without a memory
    max_batch: int | None  # largest batch at this context that fits `memory`
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether weights and peak fit the memory (true where none was given)."""
        return self.memory is None or (self.max_batch is not None and self.max_batch >= self.batch)

    @property
    def kv_dtype_words(self) -> str:
        """What stands in front of "cache": `int8`, or how many owners have which precision."""
        return describe_precision(self.kv_dtype, self.layout)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; bytes as integers."""
        margin = self.bytes_per_token
        weights = self.weights
        return {
            "model": self.model.name,
            "context": self.context,
            "batch": self.batch,
            "kv_dtype": self.kv_dtype if isinstance(self.kv_dtype, str) else {i: self.kv_dtype[i] for i in self.layout.owners},
            "kv_layout": self.kv_layout,
            "kv_bytes": dict(self.kv_bytes),
            "held_bytes": self.held_bytes,
            "peak_bytes": self.peak_bytes,
            "kv_bytes_without": asdict(self.without),
            "kv_bytes_per_token": margin.numerator if margin.denominator == 1 else float(margin),
            "decode_read_bytes": self.read_bytes,
            "weight_bytes": weights.bytes if weights else None,
            "weight_dtype": weights.precision if weights else None,
            "per_layer_table_bytes": weights.per_layer_table_bytes if weights else None,
            "parameters": weights.parameters.total if weights else None,
            "memory": self.memory,
            "max_context": self.max_context,
            "max_batch": self.max_batch,
            "model_max_context": self.layout.max_context,
            "fits": self.fits,
            "source": self.model.source,
            "warnings": list(self.warnings),
        }


def plan(
    model: str | ModelConfig,
    context: int | None = None,
    batch: int = 1,
    kv_dtype: str | Path | Mapping[int, str] = "bf16",
    kv_layout: str = "plain",
    weights: str = "bf16",
    memory: int | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> ModelPlan:
    """The report on `model` (anything that `resolve` takes) after `context` tokens in each of `batch` sequences.

    `context` defaults to 131,072 tokens, or the model's own limit where that is less; `memory` is in bytes and holds the weights too.
    `kv_dtype` is a precision, one by owner's layer, or the path of a JSON file that `kvshare tune` wrote.
    Raises `ConfigError` for configs that cannot be read, and where `memory` is given for a model whose weights are not counted.
    """
    _check_arguments({"context": context, "batch": batch, "chunk": chunk, "memory": memory}, weights)
    found = resolve(model) if isinstance(model, str) else model
    layout = layout_from_config(found.config, kv_layout)
    precision = read_precision(kv_dtype, layout)
    context = context or min(DEFAULT_CONTEXT, layout.max_context or DEFAULT_CONTEXT)
    warnings = list(layout.warnings)
    if layout.max_context is not None and context > layout.max_context:
        warnings.append(f"{context:,} tokens are more than the {layout.max_context:,} that the model was made for")
    try:
        sized = _weigh(count_parameters(Fields(text_config(found.config)), layout), weights)
    except ConfigError as error:
        if memory is not None:
            raise ConfigError("memory", f"nothing can be said about it, because the weights are not counted ({error})") from None
        sized = None
        warnings.append(f"the weights are not counted ({error})")
    longest = largest = None
    if memory is not None and sized is not None:
        left = memory - sized.bytes
        longest = _largest(lambda tokens: layout.peak_bytes(tokens, batch, precision, chunk) <= left, layout.max_context or UNBOUNDED)
        largest = _largest(lambda sequences: layout.peak_bytes(context, sequences, precision, chunk) <= left, UNBOUNDED)
    split = layout.bytes_by_kind(context, batch, precision)
    return ModelPlan(
        model=found,
        layout=layout,
        context=context,
        batch=batch,
        kv_dtype=precision,
        kv_layout=kv_layout,
        kv_bytes={"total": sum(split.values()), **split},
        held_bytes=layout.held_bytes(context, batch, precision),
        peak_bytes=layout.peak_bytes(context, batch, precision, chunk),
        without=Without(
            sharing=layout.without_sharing().bytes(context, batch, precision),
            windows=layout.without_windows().bytes(context, batch, precision),
            both=layout.without_sharing().without_windows().bytes(context, batch, precision),
        ),
        bytes_per_token=layout.bytes_per_token(precision),
        read_bytes=layout.read_bytes(context, batch, precision),
        weights=sized,
        memory=memory,
        max_context=longest,
        max_batch=largest,
        warnings=tuple(warnings),
    )


def _check_arguments(numbers: Mapping[str, int | None], weights: str) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(name, f"must be at least 1, not {value}")
    if weights not in WEIGHT_BITS:
        raise ConfigError("weights", f"unknown precision {weights!r}: choose one of {', '.join(WEIGHT_BITS)}")


def check_fits(report: ModelPlan) -> None:
    """Raises `CapacityError`, with the numbers and the remedies, where the plan does not fit its memory."""
    if report.fits or report.weights is None or report.memory is None:
        return
    need = report.weights.bytes + report.peak_bytes
    remedies = [f"a context of {report.max_context:,}"] if report.max_context else []
    remedies += [f"a batch of {report.max_batch:,}"] if report.max_batch else []
    remedies += ["a lower --kv-dtype or --weights"]
    raise CapacityError(
        f"{report.model.name} does not fit: weights {report.weights.bytes:,} B and cache {report.peak_bytes:,} B need {need:,} B, "
        f"{need - report.memory:,} more than the {report.memory:,} given; {' or '.join(remedies)} needs less"
    )


def _weigh(parameters: Parameters, precision: str) -> Weights:
    bits = WEIGHT_BITS[precision]
    return Weights(precision, parameters, _bytes(parameters.resident, bits), _bytes(parameters.per_layer_tables, bits))


def _bytes(parameters: int, bits: Fraction) -> int:
    return -(-(parameters * bits) // 8)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, 0 where not even 1 does. What fits must be downward closed."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, min(2 * high, limit)
    if high == limit and fits(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

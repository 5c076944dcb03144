"""The same weights in transformers' own model: the one comparison that does not rely on kvshare alone."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare.checkpoints import Checkpoint
from kvshare.doctor.comparison import HEAD_ROWS, Difference
from kvshare.doctor.report import Check
from kvshare.engine.llm import free_memory
from kvshare.models.model import Model

NAME = "equals transformers"
_ROOM = 0.8  # of the free memory that may be filled
_OWN_FIELDS = ("kv_sharing",)  # fields of a config that kvshare reads and transformers ignores


class NotComparable(Exception):
    """Why transformers cannot run this checkpoint."""


def oracle_check(
    model: Model, checkpoint: Checkpoint, path: Path, ids: Sequence[int], hidden: Tensor, dtype: torch.dtype, dtype_name: str
) -> Check:
    """Logits of `model` (by its hidden states [tokens, hidden] of `ids`) against transformers' on the same weights in `dtype`."""
    try:
        with quiet_transformers():
            oracle = load_oracle(checkpoint, path, dtype)
            logits = _logits(oracle, ids)
    except NotComparable as reason:
        return Check(NAME, dtype_name, "not compared", str(reason))
    difference = Difference()
    with torch.inference_mode():
        for start in range(0, len(ids), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            difference.add(logits[part], model.logits(hidden[part]))
    return difference.check(NAME, dtype_name, type(oracle).__name__)


def load_oracle(checkpoint: Checkpoint, path: Path, dtype: torch.dtype) -> Any:
    """transformers' model with the weights of `checkpoint`, which lies at `path`. Raises `NotComparable` with the reason."""
    if importlib.util.find_spec("transformers") is None:
        raise NotComparable("transformers is not installed")
    ignored = [field for field in _OWN_FIELDS if checkpoint.config.get(field)]
    if ignored:
        raise NotComparable(f"transformers does not know {', '.join(ignored)} and would run another model")
    needed = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()) * dtype.itemsize
    free = free_memory()
    if needed > _ROOM * free:
        raise NotComparable(f"a second copy of the weights takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    try:
        return (_from_directory(checkpoint, path, dtype) if path.is_dir() else _from_tensors(checkpoint, dtype)).eval()
    except NotComparable:
        raise
    except Exception as error:  # whatever transformers raises for a checkpoint that it does not know
        raise NotComparable(f"transformers does not load this checkpoint ({type(error).__name__}: {_first_line(error)})") from None


def _from_directory(checkpoint: Checkpoint, path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "attn_implementation": "eager", "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(path, **options)  # pyright: ignore[reportGeneralTypeIssues]
    _check_missing(info["missing_keys"])
    names = checkpoint.names()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in names:  # transformers 5.23 overwrites a part of ZAYA1's balancing biases when it loads them
                buffer.copy_(checkpoint.get(name))
    return model


def _from_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A GGUF file's numbers, decoded as kvshare decodes them, in transformers' model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(checkpoint.config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), dtype=dtype, attn_implementation="eager"
    )
    names = checkpoint.names()
    missing = set(model.state_dict()) - names - set(model.all_tied_weights_keys)
    _check_missing(missing)
    with torch.no_grad():
        for name, parameter in model.state_dict(keep_vars=True).items():
            if name in names:
                parameter.copy_(checkpoint.get(name))
    return model


def _check_missing(names: Any) -> None:
    if names:
        raise NotComparable(f"transformers finds no weights for {len(names)} of its parameters, {sorted(names)[0]} among them")


@torch.inference_mode()
def _logits(oracle: Any, ids: Sequence[int]) -> Tensor:  # [tokens, vocab]
    try:
        if hasattr(oracle, "set_experts_implementation"):
            oracle.set_experts_implementation("eager")
        return oracle(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    except Exception as error:  # of somebody else's model: says nothing about ours
        raise NotComparable(f"transformers loads it but does not run it ({type(error).__name__}: {_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings and progress bars on this side of the table."""
    from importlib import import_module

    try:
        log: Any = import_module("transformers.utils.logging")
    except ImportError:
        yield
        return
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()

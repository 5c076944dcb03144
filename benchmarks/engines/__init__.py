"""The engines that are compared, each run alone: `python -m benchmarks.engines.<module> MODEL SPEC` prints a JSON line a measurement.

This file and the modules of other engines import nothing of kvshare: an engine may run in an environment of its own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Reads = Literal["as given", "plain", "gguf"]


@dataclass(frozen=True, slots=True)
class Engine:
    module: str
    reads: Reads  # the model as it was named; its plain weights as a Hugging Face directory; a GGUF file
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None  # the environment variable that names the interpreter where it is installed


ENGINES: Mapping[str, Engine] = {
    "kvshare": Engine("kvshare_engine", "as given"),
    "kvshare-bf16": Engine("kvshare_engine", "plain", {"weights": "bf16"}),
    "kvshare-torch": Engine("kvshare_engine", "plain", {"weights": "bf16"}, {"KVSHARE_KERNELS": "0"}),
    "kvshare-int8": Engine("kvshare_engine", "plain", {"weights": "int8"}),
    "kvshare-int4": Engine("kvshare_engine", "plain", {"weights": "int4"}),
    "transformers": Engine("transformers_engine", "plain"),
    "llama.cpp": Engine("llama_cpp", "gguf", {"flash": "on"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    "llama.cpp-fa0": Engine("llama_cpp", "gguf", {"flash": "off"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    "vllm-cpu": Engine("vllm_cpu", "plain", {"eager": True}, python="VLLM_PYTHON"),
    "vllm-cpu-compiled": Engine("vllm_cpu", "plain", {"eager": False}, python="VLLM_PYTHON"),
}
"""By the name that `--engines` takes. Behind a kvshare engine's name `+kv-NAME` chooses the cache's precision, `+act-NAME` activations'."""

SETTINGS: Mapping[str, str] = {"kv": "kv_dtype", "act": "activations"}


def engine_named(name: str) -> Engine:
    """The engine that a name of `--engines` stands for. Raises `KeyError` for others."""
    base, *parts = re.split(r"\+(?=kv-|act-)", name)  # `rot4+32` is one precision
    engine = ENGINES[base]
    if not parts:
        return engine
    if engine.module != "kvshare_engine":
        raise KeyError(name)
    chosen = {SETTINGS[kind]: precision for kind, _, precision in (part.partition("-") for part in parts)}
    return Engine(engine.module, engine.reads, {**engine.options, **chosen}, engine.environment)


def serve(run: Callable[..., Iterator[Mapping[str, Any]]]) -> None:
    """Call `run(model, **spec)` as the command line says; each mapping that it yields is one line on stdout."""
    for row in run(sys.argv[1], **json.loads(sys.argv[2])):
        print(json.dumps(row), flush=True)

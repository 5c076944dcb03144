"""The command with which another engine serves a model inside the planned memory, and where that engine is known to reserve more.

Flags are those of vLLM 0.32, llama.cpp b11434, SGLang 0.5 and TensorRT-LLM 1.x.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvshare.errors import RequestError
from kvshare.planner.report import ModelPlan


@dataclass(frozen=True, slots=True)
class Deployment:
    """A command for a shell, a file that it needs (name, text), and what to know before it is run."""

    command: str
    notes: tuple[str, ...]
    file: tuple[str, str] | None = None


def deployment(report: ModelPlan, engine: str) -> Deployment:
    """How `engine` (a key of `ENGINES`) serves what was planned. Raises `RequestError` for what that engine cannot store or run."""
    if engine not in ENGINES:
        raise RequestError(f"unknown engine {engine!r}: choose one of {', '.join(ENGINES)}")
    if report.layout.external:
        raise RequestError(f"{report.model.name} is a drafter: it is served with the model that it drafts for")
    return ENGINES[engine](report)


def _line(*words: str | int) -> str:
    return " ".join(shlex.quote(str(word)) for word in words)


def _precision(report: ModelPlan, engine: str, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    name = report.kv_dtype if isinstance(report.kv_dtype, str) else "mixed"
    if name not in known:
        raise RequestError(f"{engine} stores no {name} cache: choose --kv-dtype from {', '.join(known)}")
    return known[name]


def _family(report: ModelPlan) -> str:
    return (report.layout.model_type or "").partition("_text")[0]


def _has_windows(report: ModelPlan) -> bool:
    return any(stream.window is not None for layer in report.layout.layers for stream in layer.streams)


def _shares(report: ModelPlan) -> bool:
    return any(owner != index for index, owner in enumerate(report.layout.owner))


def _common_notes(report: ModelPlan) -> list[str]:
    notes = []
    if report.kv_layout != "plain":
        notes.append(
            f"stores plain keys and values: the {report.kv_layout} form of K = V layers is kvshare's alone, plan with --kv-layout plain"
        )
    if not report.fits:
        notes.append("does not fit the memory that was given: lower the context or the batch first")
    return notes


def _vllm(report: ModelPlan) -> Deployment:
    precision = _precision(
        report,
        "vLLM",
        {
            "bf16": (),
            "fp8": ("--kv-cache-dtype", "fp8"),
            "int8": ("--kv-cache-dtype", "int8_per_token_head"),
            "int4": ("--kv-cache-dtype", "int4_per_token_head"),
            "native": ("--kv-cache-dtype", "fp8") if _family(report).startswith("deepseek") else (),
        },
    )
    notes = _common_notes(report)
    words: list[str | int] = ["vllm", "serve", report.model.repository, "--max-model-len", report.context, "--max-num-seqs", report.batch]
    words += precision
    if report.memory is not None and report.weights is not None:
        # it loads the per-layer tables too
        left = report.memory - report.weights.bytes - report.weights.per_layer_table_bytes
        words += ["--kv-cache-memory-bytes", left] if left > 0 else []
        if left < report.peak_bytes:
            notes.append("it holds the per-layer embedding tables in memory, and beside them the planned cache does not fit")
    if _shares(report):
        words.append("--kv-sharing-fast-prefill")
        notes.append("--kv-sharing-fast-prefill is off by default; with it, requests for prompt_logprobs are refused")
    if _has_windows(report) and not _family(report).startswith("deepseek"):
        notes.append(
            "its pool pads layers of different kinds to one page size: for Gemma 4 E2B it took 19.1 kB a token where the layout needs 6.1 "
            "(vLLM 0.32 on a CPU, 1 GiB = 56,160 tokens), so it may refuse this context or hold fewer sequences than planned"
        )
    if report.kv_dtype in ("int8", "int4") and _family(report).startswith("gemma4"):
        notes.append("Gemma 4's two head widths did not start with per-token-head precisions (vllm-project/vllm issue 40388): fp8 does")
    return Deployment(_line(*words), tuple(notes))


def _llama_cpp(report: ModelPlan) -> Deployment:
    precision = _precision(
        report,
        "llama.cpp",
        {"bf16": ("bf16",), "fp16": ("f16",), "int8": ("q8_0",), "int4": ("q4_0",), "fp32": ("f32",), "native": ("f16",)},
    )
    notes = _common_notes(report)
    model = (
        ("-m", report.model.repository)
        if report.model.repository.endswith(".gguf")
        else ("-m", f"{report.model.name.rpartition('/')[2]}.gguf")
    )
    words: list[str | int] = ["llama-server", *model, "-c", report.context * report.batch, "-np", report.batch]
    words += ["-ctk", precision[0], "-ctv", precision[0], "-fa", "on"]
    if not report.model.repository.endswith(".gguf"):
        notes.append("takes a GGUF file: convert the model, or give one from the hub with -hf")
    notes.append("-c is divided over the -np slots")
    if _has_windows(report):
        notes.append(
            "window layers keep a ring of the window plus a batch (1,024 cells for a window of 512); --swa-full would keep every token"
        )
    if _shares(report):
        notes.append("runs the sharing layers over the whole prompt: it has no fast prefill (ggml-org/llama.cpp pull request 29189)")
    if report.kv_dtype == "int4" and _family(report).startswith("gemma"):
        notes.append("users report that q4_0 keys ruin Gemma's answers where q8_0 does not")
    unsupported = {"zaya": "ZAYA1", "laguna": "Laguna"}
    if _family(report) in unsupported:
        notes.append(f"its main branch does not run {unsupported[_family(report)]}")
    return Deployment(_line(*words), tuple(notes))


def _sglang(report: ModelPlan) -> Deployment:
    precision = _precision(
        report, "SGLang", {"bf16": (), "fp8": ("--kv-cache-dtype", "fp8_e4m3"), "native": ("--kv-cache-dtype", "fp8_e4m3")}
    )
    words: list[str | int] = ["python", "-m", "sglang.launch_server", "--model-path", report.model.repository]
    words += [
        "--context-length",
        report.context,
        "--max-running-requests",
        report.batch,
        "--max-total-tokens",
        report.context * report.batch,
        *precision,
    ]
    notes = _common_notes(report)
    if report.memory is not None and report.weights is not None:
        notes.append(
            "add --mem-fraction-static (weights and cache as a share of the device's memory) if it reserves too much or too little"
        )
    if _has_windows(report):
        notes.append("window layers have a pool of their own, sized by --swa-full-tokens-ratio rather than by the window")
    if _shares(report):
        notes.append("runs the sharing layers over the whole prompt: fast prefill is an open pull request (sgl-project/sglang 27183)")
    return Deployment(_line(*words), tuple(notes))


def _tensorrt_llm(report: ModelPlan) -> Deployment:
    precision = _precision(report, "TensorRT-LLM", {"bf16": ("auto",), "fp8": ("fp8",), "native": ("fp8",)})
    words: list[str | int] = ["trtllm-serve", report.model.repository, "--max_seq_len", report.context, "--max_batch_size", report.batch]
    words += ["--extra_llm_api_options", "kv.yaml"]
    text = f"kv_cache_config:\n  dtype: {precision[0]}\n  max_tokens: {report.context * report.batch}\n"
    notes = _common_notes(report)
    if _family(report).startswith("gemma"):
        words += ["--backend", "_autodeploy"]
        notes.append("Gemma 3n and 4 run in its AutoDeploy backend; E4B failed on small devices (NVIDIA/TensorRT-LLM issue 14942)")
    if _has_windows(report):
        notes.append("splits its memory between window and full layers in a fixed proportion, which its documentation calls not optimal")
    if _family(report) == "zaya":
        notes.append("does not run ZAYA1")
    return Deployment(_line(*words), tuple(notes), ("kv.yaml", text))


ENGINES: Mapping[str, Callable[[ModelPlan], Deployment]] = {
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt_llm,
}
"""How each engine is told what was planned."""

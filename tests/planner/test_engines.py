"""Other engines' commands: the flags that were planned, and what is known of what those engines reserve."""

from __future__ import annotations

import shlex

import pytest

from kvshare.errors import RequestError
from kvshare.planner import plan
from kvshare.planner.engines import ENGINES, deployment

GB = 10**9


def flags(engine: str, model: str, **options: object) -> dict[str, str]:
    """The command's flags with their values."""
    words = shlex.split(deployment(plan(model, **options), engine).command)  # pyright: ignore[reportArgumentType]
    return {
        word: (words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("-") else "")
        for i, word in enumerate(words)
        if word.startswith("-")
    }


def test_vllm_gets_the_memory_that_the_weights_leave_and_fast_prefill():
    found = flags("vllm", "gemma-4-E2B", context=32_768, batch=4, kv_dtype="fp8", memory=24 * GB)
    assert found["--max-model-len"] == "32768"
    assert found["--max-num-seqs"] == "4"
    assert found["--kv-cache-dtype"] == "fp8"
    assert found["--kv-cache-memory-bytes"] == str(24 * GB - 2 * 4_628_569_344)
    assert "--kv-sharing-fast-prefill" in found


def test_fast_prefill_only_where_layers_share():
    assert "--kv-sharing-fast-prefill" not in flags("vllm", "gemma-4-31B")


def test_vllm_reserves_more_than_the_layout_needs():
    assert any("19.1 kB a token where the layout needs 6.1" in note for note in deployment(plan("gemma-4-E2B"), "vllm").notes)


def test_llama_cpp_divides_its_context_over_the_slots():
    found = flags("llama.cpp", "gemma-4-E2B", context=8192, batch=4, kv_dtype="int8")
    assert (found["-c"], found["-np"], found["-ctk"], found["-ctv"]) == ("32768", "4", "q8_0", "q8_0")


def test_sglang_and_tensorrt_llm():
    found = flags("sglang", "Llama-3.1-8B", context=8192, batch=4, kv_dtype="fp8")
    assert (found["--context-length"], found["--max-running-requests"], found["--kv-cache-dtype"]) == ("8192", "4", "fp8_e4m3")
    found = flags("tensorrt-llm", "Llama-3.1-8B", context=8192, batch=4)
    assert (found["--max_seq_len"], found["--max_batch_size"]) == ("8192", "4")
    command = deployment(plan("Llama-3.1-8B", context=8192, batch=4, kv_dtype="fp8"), "tensorrt-llm")
    assert command.file == ("kv.yaml", "kv_cache_config:\n  dtype: fp8\n  max_tokens: 32768\n")


def test_a_path_is_quoted(tmp_path):
    directory = tmp_path / "my model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64}')
    for engine in ENGINES:
        assert len(shlex.split(deployment(plan(str(directory)), engine).command)) > 4
    assert shlex.split(deployment(plan(str(directory)), "vllm").command)[2] == str(directory)


def test_what_an_engine_cannot_store_is_refused_with_what_it_can():
    with pytest.raises(RequestError, match="TensorRT-LLM stores no int4 cache: choose --kv-dtype from bf16, fp8"):
        deployment(plan("Llama-3.1-8B", kv_dtype="int4"), "tensorrt-llm")
    with pytest.raises(RequestError, match="unknown engine 'ollama'"):
        deployment(plan("Llama-3.1-8B"), "ollama")


def test_compact_forms_are_not_promised_of_other_engines():
    notes = deployment(plan("gemma-4-31B", kv_layout="compact"), "vllm").notes
    assert any("stores plain keys and values" in note for note in notes)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_fit_is_said(engine: str):
    assert any("does not fit the memory" in note for note in deployment(plan("gemma-4-31B", memory=24 * GB), engine).notes)

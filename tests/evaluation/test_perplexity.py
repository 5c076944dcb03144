"""Perplexity is what transformers' logits give: on a tiny model always, on pretrained weights with `pytest -m demo`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from fixtures import tiny_llama

from kvshare import LLM
from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.packages import PACKAGES
from kvshare.checkpoints.resolve import locate
from kvshare.demo import sample_text
from kvshare.doctor.oracle import load_oracle
from kvshare.errors import CheckpointError, RequestError
from kvshare.evaluation.perplexity import perplexity, text_windows


@torch.no_grad()
def oracle_perplexity(model: torch.nn.Module, windows: Sequence[Sequence[int]]) -> float:
    total, count = 0.0, 0
    for ids in windows:
        tokens = torch.tensor(ids)[None]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return math.exp(total / count)


def test_windows_cover_the_text_once(tmp_path: Path) -> None:
    tokenizer = LLM(tiny_llama(tmp_path), progress=False).tokenizer
    text = "a" * 33
    assert [len(window) for window in text_windows(tokenizer, text, 8)] == [8, 8, 8, 8]  # the 33rd has nothing before it
    assert [token for window in text_windows(tokenizer, text + "b", 8) for token in window] == tokenizer.encode(text + "b")
    with pytest.raises(RequestError, match="1 tokens has no token to predict"):
        text_windows(tokenizer, "a")


def test_every_window_begins_with_bos_where_the_model_needs_it() -> None:
    tokenizer = LLM("demo", progress=False).tokenizer
    windows = text_windows(tokenizer, sample_text(), 100)
    assert {window[0] for window in windows} == {tokenizer.bos_id}
    assert [token for window in windows for token in window[1:]] == tokenizer.encode(sample_text())[1:]


def test_perplexity_equals_transformers(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, kv_sharing=None, layer_types=None, sliding_window=None)
    llm = LLM(directory, progress=False)
    windows = text_windows(llm.tokenizer, sample_text()[:700], 200)
    found = perplexity(llm.model, windows)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert (found.tokens, found.windows) == (696, 4)
    assert found.perplexity == pytest.approx(oracle_perplexity(oracle, windows), rel=1e-5)


@pytest.mark.demo
@pytest.mark.parametrize("name", PACKAGES)
def test_perplexity_of_pretrained_weights_equals_transformers_to_three_digits(name: str) -> None:
    try:
        path = locate(name)
    except CheckpointError as error:
        pytest.skip(str(error))
    llm = LLM(path, dtype="float32", max_context=1024, max_sequences=1, progress=False)
    windows = text_windows(llm.tokenizer, sample_text(), 1024)[:2]
    found = perplexity(llm.model, windows).perplexity
    del llm
    expected = oracle_perplexity(load_oracle(open_checkpoint(path), path, torch.float32), windows)
    print(f"{name}: {found:.6f}, transformers {expected:.6f}")
    assert found == pytest.approx(expected, rel=5e-4)

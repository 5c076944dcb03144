"""Tokenizers rebuilt from GGUF metadata give the ids of those they were made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.gguf_tokenizer import TokenType, merges_from_scores, tokenizer_from_metadata
from kvshare.errors import CheckpointError

TEXT = Path(__file__).with_name("test_tokenizer.py").read_text().splitlines()


def byte_level_metadata(pre_tokenizer: pre_tokenizers.PreTokenizer, name: str) -> tuple[FastTokenizer, dict[str, Any]]:
    """A byte-level BPE trained on a little text, and the metadata that a converter writes for it."""
    fast = FastTokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    saved = json.loads(fast.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [TokenType.CONTROL if token in ("<s>", "</s>") else TokenType.NORMAL for token in tokens],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return fast, metadata


def sentence_piece_metadata(**changes: Any) -> dict[str, Any]:
    """A small SentencePiece vocabulary: control tokens, bytes, letters, pieces with scores that put long ones last."""
    pieces = ["▁", *"abcehlotwé", "▁t", "he", "▁the", "ll", "lo", "ello", "hello", "at", "▁a"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = (
        [TokenType.CONTROL] * 3
        + [TokenType.UNKNOWN]
        + [TokenType.USER_DEFINED] * 2
        + [TokenType.BYTE] * 256
        + [TokenType.NORMAL] * len(pieces)
    )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - len(pieces)) + [-float(at) for at in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def build(metadata: dict[str, Any], model_type: str = "llama", vocab_size: int | None = None):
    return tokenizer_from_metadata(
        metadata, {"model_type": model_type, "vocab_size": vocab_size or len(metadata["tokenizer.ggml.tokens"])}, "file.gguf"
    )


def gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


GPT2, GPT2_METADATA = byte_level_metadata(gpt2(), "gpt-2")
SMOLLM, SMOLLM_METADATA = byte_level_metadata(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()]), "smollm")
REBUILT = {"gpt-2": (GPT2, build(GPT2_METADATA)), "smollm": (SMOLLM, build(SMOLLM_METADATA))}


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(REBUILT)), text=st.one_of(st.text(max_size=80), st.sampled_from(TEXT)))
def test_byte_level_ids_are_those_of_the_original(name: str, text: str):
    original, rebuilt = REBUILT[name]
    ids = original.encode(text).ids
    assert rebuilt.encode(text) == ids
    assert rebuilt.decode(ids) == original.decode(ids)


@pytest.mark.parametrize(
    ("name", "digits"),
    [("gpt-2", ["12345"]), ("smollm", ["1", "2", "3", "4", "5"]), ("llama-bpe", ["123", "45"]), ("qwen2", ["1", "2", "3", "4", "5"])],
)
def test_text_is_cut_as_the_rules_name_says(name: str, digits: list[str]):
    metadata = {**GPT2_METADATA, "tokenizer.ggml.pre": name}
    cut = build(metadata)._fast.pre_tokenizer.pre_tokenize_str("it's 12345\n\n ok")
    assert [piece for piece, _ in cut if piece.strip("Ġ").isdigit()] == [("Ġ" if name == "gpt-2" else "") + digits[0], *digits[1:]]
    assert [piece for piece, _ in cut][:2] == ["it", "'s"]


def _reference_sentence_piece(text: str, ids: dict[str, int], scores: Sequence[float]) -> list[int]:
    """SentencePiece's algorithm as it is told: join, again and again, the neighbours whose join scores highest, the leftmost first."""
    parts = list(text)
    while True:
        joins = [(scores[ids[left + right]], -at) for at, (left, right) in enumerate(pairwise(parts)) if left + right in ids]
        if not joins:
            return [ids[part] for part in parts]
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.text(alphabet="abcehlotwé ", max_size=30))
def test_sentence_piece_ids_follow_from_the_scores(text: str):
    text = " ".join(text.split(" "))
    while "  " in text:  # two spaces are a token of their own
        text = text.replace("  ", " ")
    metadata = sentence_piece_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids = {token: at for at, token in enumerate(tokens) if types[at] == TokenType.NORMAL}
    tokenizer = build(metadata)
    expected = _reference_sentence_piece(text.replace(" ", "▁"), ids, metadata["tokenizer.ggml.scores"])
    assert tokenizer.encode(text, special=False) == expected
    assert tokenizer.decode(expected) == text


def test_user_defined_pieces_bytes_and_controls_are_found_in_text():
    tokenizer = build(sentence_piece_metadata())
    ids = tokenizer.encode("<bos>a  b\n\nż", special=False)
    assert [tokenizer.token(token) for token in ids] == ["<bos>", "a", "  ", "b", "\n\n", "<0xC5>", "<0xBC>"]
    assert tokenizer.decode(ids) == "a  b\n\nż"


def test_a_file_that_spells_user_defined_spaces_as_pieces_is_read_alike():
    metadata = sentence_piece_metadata()
    metadata["tokenizer.ggml.tokens"][4] = "▁▁"
    assert build(metadata).encode("a  b", special=False)[1] == 4


def test_a_prefix_space_is_added_and_taken_away_where_the_file_asks_for_it():
    tokenizer = build(sentence_piece_metadata(add_space_prefix=True))
    ids = tokenizer.encode("the", special=False)
    assert [tokenizer.token(token) for token in ids] == ["▁the"]
    assert tokenizer.decode(ids) == "the"


def test_gemma4s_own_merges_are_used_with_bytes_to_fall_back_to():
    scored = sentence_piece_metadata()
    merges = merges_from_scores(*(scored[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")))
    metadata = sentence_piece_metadata(model="gemma4", merges=[" ".join(merge) for merge in merges])
    del metadata["tokenizer.ggml.scores"]
    for text in ("hello the  cat", "łé"):
        assert build(metadata, "gemma4_text").encode(text) == build(scored, "gemma4_text").encode(text)


@pytest.mark.parametrize(
    ("model_type", "keys", "begins_with_bos"),
    [
        ("gemma3_text", {"add_bos_token": False}, True),
        ("gemma3_text", {}, True),
        ("llama", {"add_bos_token": False}, False),
        ("llama", {}, True),  # SentencePiece's default
    ],
)
def test_bos_stands_where_the_model_needs_it(model_type: str, keys: dict[str, Any], begins_with_bos: bool):
    tokenizer = build(sentence_piece_metadata(**keys), model_type)
    assert (tokenizer.encode("a")[0] == 2) == begins_with_bos


def test_ends_come_from_every_key_and_from_the_template():
    metadata = sentence_piece_metadata(eot_token_id=9, eom_token_id=10)
    assert build(metadata).eos_ids == {1, 9, 10}
    metadata["tokenizer.ggml.tokens"][0] = "<end_of_turn>"
    metadata["tokenizer.chat_template"] = "{{ messages[0]['content'] }}<end_of_turn>"
    assert build(metadata).eos_ids == {0, 1, 9, 10}
    assert build(metadata).render_chat([{"role": "user", "content": "hi"}]) == "hi<end_of_turn>"


def test_embeddings_may_outnumber_tokens():
    assert build(GPT2_METADATA, vocab_size=512).vocab_size == 512


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "of the kind 'bert'; what loads: gpt2, llama, gemma4"),
        ({}, "of the kind 'None'"),
        ({"tokenizer.ggml.model": "llama"}, "vocabulary is missing"),
        (sentence_piece_metadata(tokens=["a", "a"], token_type=[1, 1]), "names a token twice"),
        (sentence_piece_metadata(tokens=["a" * 513]), "more than 512 characters"),
        (sentence_piece_metadata(tokens=[1, 2]), "vocabulary is missing"),
        (sentence_piece_metadata(token_type=[1]), "1 token types .* do not fit together"),
        (sentence_piece_metadata(scores=[0.0]), "1 scores for"),
        (sentence_piece_metadata(unknown_token_id=1 << 40), "cannot be built"),
        ({**GPT2_METADATA, "tokenizer.ggml.pre": "tekken"}, "unknown rule 'tekken'.*known are gpt-2, smollm, llama-bpe, qwen2"),
        ({**GPT2_METADATA, "tokenizer.ggml.merges": ["ab"]}, "'ab' is not a merge"),
        ({**GPT2_METADATA, "tokenizer.ggml.merges": ["nothing here"]}, "cannot be built"),
    ],
)
def test_tables_that_do_not_fit_are_refused(metadata: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=rf"file\.gguf: .*{message}"):
        tokenizer_from_metadata(metadata, {"model_type": "llama", "vocab_size": 1 << 20}, "file.gguf")


JUNK = [None, "", "text", True, -1, 3, 1 << 63, 0.5, [], [1], ["a"], ["a b"], [None], [[]]]


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(["gpt2", "llama", "gemma4"]), data=st.data())
def test_junk_in_any_key_is_refused_or_makes_a_tokenizer(kind: str, data: st.DataObject):
    metadata = dict(GPT2_METADATA) if kind == "gpt2" else sentence_piece_metadata(model=kind)
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=3)):
        metadata[key] = data.draw(st.sampled_from(JUNK))
    try:
        tokenizer = tokenizer_from_metadata(metadata, {"model_type": "llama", "vocab_size": 1000}, "file.gguf")
    except CheckpointError:
        return
    tokenizer.decode(tokenizer.encode("a b"))


@pytest.mark.demo
def test_gemmas_ids_are_those_of_its_published_tokenizer():
    """Expected ids were taken from the tokenizer.json that Google publishes with Gemma 3."""
    try:
        tokenizer = open_checkpoint("gemma3-270m").tokenizer()
    except CheckpointError as missing:
        pytest.skip(str(missing))
    for text, ids in GEMMA_IDS.items():
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


GEMMA_IDS = {
    "Hello, world!": [2, 9259, 236764, 1902, 236888],
    "  two spaces,   three": [2, 138, 13498, 9952, 236764, 139, 19891],
    "def f(x):\n    return x**2\n\n\n": [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 1018, 236778, 109],
    "naïve café — 3.14159": [2, 1789, 238527, 560, 33443, 2192, 236743, 236800, 236761, 236770, 236812, 236770, 236810, 236819],
    "日本語のテキスト": [2, 94951, 236945, 95830],
    "हिन्दी и русский": [2, 16017, 70249, 1079, 170362],
    "🙂👨‍👩‍👧": [2, 240731, 243874, 237243, 243767, 237243, 244814],
    "\ttab\t\ttabs": [2, 255968, 4823, 255969, 39218],
    "<h1>title</h1>": [2, 184, 3250, 191],
}

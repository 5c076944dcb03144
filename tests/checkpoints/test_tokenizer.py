"""Tokenizers of directories: which ids begin and end a text, and text from ids that arrive one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from kvshare.checkpoints.tokenizer import Tokenizer, end_ids, tokenizer_from_directory
from kvshare.errors import CheckpointError, RequestError

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, TURN_BEGIN, TURN_END = range(256, 260)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> FastTokenizer:
    """One token a byte, and the special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(SPECIAL))
    return fast


def in_directory(
    path: Path,
    *,
    config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    post_processor: bool = False,
) -> Tokenizer:
    fast = byte_tokenizer()
    if post_processor:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, **(settings or {})}))
    return tokenizer_from_directory(path, config or {"model_type": "llama"}, generation_config or {})


@pytest.mark.parametrize(
    ("model_type", "settings", "post_processor", "begins_with_bos"),
    [
        ("llama", {}, False, False),
        ("llama", {}, True, True),
        ("llama", {"add_bos_token": True}, False, True),
        ("llama", {"add_bos_token": True}, True, True),
        ("llama", {"add_bos_token": False}, True, False),
        ("gemma3_text", {"add_bos_token": False}, False, True),  # Gemma needs it, whatever its files say
        ("gemma4_text", {}, True, True),
    ],
)
def test_bos_stands_where_the_model_needs_it_and_once(
    model_type: str, settings: dict[str, Any], post_processor: bool, begins_with_bos: bool, tmp_path: Path
):
    tokenizer = in_directory(tmp_path, config={"model_type": model_type}, settings=settings, post_processor=post_processor)
    letters = tokenizer.encode("hi", special=False)
    assert len(letters) == 2
    assert tokenizer.encode("hi") == [BOS] * begins_with_bos + letters
    assert tokenizer.bos_id == BOS


def test_bos_and_eos_may_be_named_by_the_config_alone(tmp_path: Path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_from_directory(tmp_path, {"model_type": "gemma4_text", "bos_token_id": BOS, "eos_token_id": EOS}, {})
    assert tokenizer.encode("a")[0] == BOS
    assert tokenizer.eos_ids == {EOS}


def test_every_id_that_ends_a_text_is_collected(tmp_path: Path):
    tokenizer = in_directory(
        tmp_path,
        config={"model_type": "llama", "eos_token_id": 7},
        generation_config={"eos_token_id": [8, 9]},
        settings={"chat_template": CHAT_TEMPLATE},
    )
    assert tokenizer.eos_ids == {7, 8, 9, EOS, TURN_END}
    assert end_ids({"eos_token_id": None}, {}, {"eos_token_id": [1, "no", None]}) == {1}


def test_a_turns_end_that_no_template_writes_does_not_end_a_text(tmp_path: Path):
    assert in_directory(tmp_path).eos_ids == {EOS}


@pytest.mark.parametrize("where", ["file", "older file", "settings", "list of named ones"])
def test_the_chat_template_is_found_wherever_it_is_kept(where: str, tmp_path: Path):
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        own: Any = "the file comes first"
    elif where == "older file":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
        own = "the file comes first"
    else:
        own = (
            CHAT_TEMPLATE
            if where == "settings"
            else [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
        )
    tokenizer = in_directory(tmp_path, settings={"chat_template": own})
    assert tokenizer.has_chat_template
    rendered = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(rendered, special=False)[-len("assistant\n") - 1] == TURN_BEGIN


def test_a_template_that_is_no_text_is_one_clear_error(tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        in_directory(tmp_path)


def test_a_base_model_refuses_to_chat(tmp_path: Path):
    with pytest.raises(RequestError, match="no chat template"):
        in_directory(tmp_path).render_chat([{"role": "user", "content": "hi"}])


def test_special_tokens_are_left_out_of_text_unless_asked_for(tmp_path: Path):
    tokenizer = in_directory(tmp_path)
    ids = [BOS, *tokenizer.encode("hi", special=False), EOS]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<s>hi</s>"


@pytest.mark.parametrize(
    ("content", "message"), [(None, r"no tokenizer\.json.*save_pretrained"), ("{}", "is no tokenizer"), ("\0", "is no tokenizer")]
)
def test_a_missing_or_broken_tokenizer_is_one_clear_error(content: str | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_directory(tmp_path, {}, {})


BYTE_LEVEL = Tokenizer(byte_tokenizer(), {})


WHOLE = {" a": 256, " the": 257, "語": 258}  # words that are one token; the others are spelled byte by byte


def _byte_fallback() -> Tokenizer:
    """One token a byte as SentencePiece spells them, and a few words with a space before."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + [word.replace(" ", "▁") for word in WHOLE]
    fast = FastTokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, [], byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Tokenizer(fast, {})


@given(st.text(max_size=60))
def test_streamed_pieces_join_to_the_decoded_text(text: str):
    ids = BYTE_LEVEL.encode(text)
    stream = BYTE_LEVEL.stream(skip_special=False)
    pieces = [stream.push(token) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in text
    assert "".join(pieces) + stream.finish() == text


@given(st.lists(st.sampled_from([*"ab é語🙂", " a", " the"]), max_size=40))
def test_streamed_pieces_join_where_characters_fall_back_to_bytes(words: list[str]):
    tokenizer, ids = _byte_fallback(), []
    for word in words:
        ids += [WHOLE[word]] if word in WHOLE else list(word.encode())
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 259), max_size=40))
def test_a_stream_of_any_bytes_gives_the_decoded_text_and_holds_back_one_character_at_most(ids: list[int]):
    stream, given_out = BYTE_LEVEL.stream(), ""
    for count, token in enumerate(ids, 1):
        given_out += stream.push(token)
        assert len(BYTE_LEVEL.decode(ids[:count])) - len(given_out) <= 3
    assert given_out + stream.finish() == BYTE_LEVEL.decode(ids)


def test_a_character_comes_out_with_its_last_byte():
    stream = BYTE_LEVEL.stream()
    assert [stream.push(token) for token in BYTE_LEVEL.encode("é🙂!")] == ["", "é", "", "", "", "🙂", "!"]
    assert stream.push(BYTE_LEVEL.encode("é")[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"

"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library.

Three kinds: `gpt2` (byte-level BPE with its merges, cut beforehand as the `pre` name says), `llama` (SentencePiece: the
merges follow from the scores) and `gemma4` (SentencePiece's spelling with its merges).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from kvshare.checkpoints.tokenizer import BOS_FAMILIES, Tokenizer
from kvshare.errors import CheckpointError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # the file's words and Hugging Face's
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LONGEST_TOKEN = 512  # characters; cutting tokens in two costs the square of their length


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_from_metadata(metadata: Mapping[str, Any], config: Mapping[str, Any], origin: str) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata. Raises `CheckpointError` for unknown kinds and for tables that do not fit each other."""
    keys = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    kind, tokens = str(keys.get("model")), keys.get("tokens")
    if kind not in _KINDS:
        raise CheckpointError(f"{origin}: tokenizer of the kind {kind!r}; what loads: {', '.join(_KINDS)}")
    if not isinstance(tokens, list) or not all(isinstance(token, str) and len(token) <= _LONGEST_TOKEN for token in tokens):
        raise CheckpointError(f"{origin}: its vocabulary is missing or holds a token of more than {_LONGEST_TOKEN} characters")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{origin}: its vocabulary names a token twice")
    types = keys.get("token_type", [TokenType.NORMAL] * len(tokens))
    if not isinstance(types, list):
        raise CheckpointError(f"{origin}: tokenizer.ggml.token_type is no list")
    if len(types) != len(tokens) or len(tokens) > config["vocab_size"]:
        raise CheckpointError(
            f"{origin}: {len(tokens)} tokens, {len(types)} token types and {config['vocab_size']} embeddings do not fit together"
        )
    try:
        fast = _KINDS[kind](keys, tokens, types)
    except Exception as error:  # the library raises bare Exception where tables contradict each other
        raise CheckpointError(f"{origin}: its tokenizer cannot be built: {error}") from None
    template = metadata.get("tokenizer.chat_template")
    named = {role: keys.get(f"{word}_token_id") for word, role in _ROLES.items()}
    known = {f"{role}_token": tokens[at] for role, at in named.items() if isinstance(at, int) and 0 <= at < len(tokens)}
    ends = [keys[key] for key in _ENDS if isinstance(keys.get(key), int)]
    return Tokenizer(fast, known, ends, template if isinstance(template, str) else None, _adds_bos(keys, config), config["vocab_size"])


def _adds_bos(keys: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    if config["model_type"] in BOS_FAMILIES:  # some files say otherwise, or nothing
        return True
    return bool(keys.get("add_bos_token", keys["model"] == "llama" or keys.get("pre") == "llama-bpe"))


def _byte_level(keys: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> FastTokenizer:
    name = str(keys.get("pre"))
    if name not in _CUTS:
        raise ValueError(f"text is cut by the unknown rule {name!r} (tokenizer.ggml.pre); known are {', '.join(_CUTS)}")
    fast = FastTokenizer(BPE(_ids(tokens), _merges(keys), ignore_merges=name == "llama-bpe"))
    fast.pre_tokenizer = _CUTS[name]()
    fast.decoder = decoders.ByteLevel()
    if name == "qwen2":
        fast.normalizer = normalizers.NFC()
    return _with_added(fast, tokens, types)


def _sentence_piece(keys: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> FastTokenizer:
    tokens = [token.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else token for token, kind in zip(tokens, types, strict=True)]
    merges = _merges(keys) if "merges" in keys else merges_from_scores(tokens, keys["scores"], types)
    unknown = keys.get("unknown_token_id")
    fast = FastTokenizer(
        BPE(_ids(tokens), merges, unk_token=tokens[unknown] if unknown is not None else None, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if keys.get("add_space_prefix", True):
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        fast.normalizer = spaces
    fast.decoder = decoders.Sequence(back)
    return _with_added(fast, tokens, types)


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges that SentencePiece does: of two neighbours that together are a piece, those first whose piece scores highest.

    Every way of cutting a piece in two pieces is a merge; among those of one piece the order is that of the parts' ids.
    """
    if len(scores) != len(tokens):
        raise ValueError(f"{len(scores)} scores for {len(tokens)} tokens")
    ids = {token: at for at, token in enumerate(tokens) if types[at] == TokenType.NORMAL}
    found: list[tuple[float, int, int]] = []
    for token, at in ids.items():
        for cut in range(1, len(token)):
            left = ids.get(token[:cut])
            if left is not None and (right := ids.get(token[cut:])) is not None:
                found.append((-scores[at], left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


_KINDS: Mapping[str, Callable[..., FastTokenizer]] = {"gpt2": _byte_level, "llama": _sentence_piece, "gemma4": _sentence_piece}


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words with the mark or space before them, runs of `digits`, punctuation, white space: how Llama 3 and Qwen cut text."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_CUTS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: _words(r"\p{N}{1,3}"),
    "qwen2": lambda: _words(r"\p{N}"),
}
"""How text is cut before bytes are merged, by `tokenizer.ggml.pre`."""


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: at for at, token in enumerate(tokens)}


def _merges(keys: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for line in keys["merges"]:
        left, space, right = line.partition(" ")
        if not (left and space and right):
            raise ValueError(f"{line!r} is not a merge of two tokens")
        merges.append((left, right))
    return merges


def _with_added(fast: FastTokenizer, tokens: Sequence[str], types: Sequence[int]) -> FastTokenizer:
    """Control tokens and user-defined ones are matched in the text before anything else; decoding leaves out the former."""
    fast.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    )
    fast.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED]
    )
    return fast

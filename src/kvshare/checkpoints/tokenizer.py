"""Text to token ids and back, chat messages to text, and text from ids that arrive one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from tokenizers import Tokenizer as FastTokenizer

from kvshare.checkpoints.chat_template import render_template
from kvshare.checkpoints.incremental import IncrementalDecoder
from kvshare.checkpoints.json_file import read_json
from kvshare.errors import CheckpointError, RequestError

BOS_FAMILIES = frozenset(
    {"gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}
)
"""Models that write nonsense without <bos> at the start, whatever the tokenizer's files say."""

_TURN_ENDS = ("<end_of_turn>", "<turn|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
"""Tokens that end the model's turn in chat templates; files of instruction-tuned models often name only the end of the text."""


class Tokenizer:
    """A model's vocabulary with its special tokens and chat template.

    `special_tokens` are by role ("bos_token", "eos_token", ...), as chat templates want them. `adds_bos` None leaves that to
    the tokenizer's own post-processor.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        special_tokens: Mapping[str, str],
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        adds_bos: bool | None = None,
        vocab_size: int | None = None,
    ):
        self._fast = fast
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self._adds_bos = adds_bos
        self.bos_id = self._id_of("bos_token")
        self.eos_ids = frozenset(eos_ids) | ({self._id_of("eos_token")} - {None}) | self._turn_ends()
        self.vocab_size = vocab_size or fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, after <bos> where the model needs it.

        A rendered chat holds its special tokens as text: encode it with `special=False`.
        """
        ids = self._fast.encode(text, add_special_tokens=special).ids
        if special and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        if special and self._adds_bos is False and ids[:1] == [self.bos_id]:
            return self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id, as it is spelled there; None where there is none."""
        return self._fast.id_to_token(token_id)

    def stream(self, skip_special: bool = True) -> IncrementalDecoder:
        """A decoder for ids that arrive one at a time."""
        return IncrementalDecoder(lambda ids: self.decode(ids, skip_special))

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """The messages as the model was trained to read them. `kwargs` (such as `tools`) reach the template.

        Raises `RequestError` where there is no template, where it refuses these messages, or where it takes too long or writes too much.
        """
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template: it was trained to continue text, not to hold a conversation. Use `generate`"
            )
        variables = {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **kwargs,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        return render_template(self.chat_template, variables)

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._fast.token_to_id(token)

    def _turn_ends(self) -> set[int]:
        """The ends of a turn that the chat template itself writes."""
        used = (self._fast.token_to_id(token) for token in _TURN_ENDS if token in (self.chat_template or ""))
        return {token_id for token_id in used if token_id is not None}


def end_ids(*configs: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end a text: every `eos_token_id`, a number or a list of numbers, in the configs given."""
    ids: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        ids.update(entry for entry in (value if isinstance(value, list) else [value]) if _is_id(entry))
    return frozenset(ids)


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def tokenizer_from_directory(path: Path, config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a directory in Hugging Face's layout. Raises `CheckpointError` where it has no `tokenizer.json` or a broken one."""
    file = path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            f"{path}: no tokenizer.json. This writes one: python -c "
            f"\"from transformers import AutoTokenizer as T; T.from_pretrained('{path}').save_pretrained('{path}')\""
        )
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise CheckpointError(f"{file} is no tokenizer: {error}") from None
    fast.no_truncation()
    fast.no_padding()
    settings = read_json(path / "tokenizer_config.json")
    named = {
        f"{role}_token": fast.id_to_token(config[f"{role}_token_id"]) for role in ("bos", "eos") if _is_id(config.get(f"{role}_token_id"))
    }
    special = {
        **{role: token for role, token in named.items() if token is not None},
        **_special_tokens(read_json(path / "special_tokens_map.json")),
        **_special_tokens(settings),
    }
    adds_bos = True if config.get("model_type") in BOS_FAMILIES else settings.get("add_bos_token")
    return Tokenizer(
        fast,
        special,
        end_ids(config, generation_config),
        _chat_template(path, settings),
        adds_bos if isinstance(adds_bos, bool) else None,
        config.get("vocab_size"),
    )


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokens by role; each is a string, or an object whose `content` is the string."""
    found = {}
    for role, token in settings.items():
        content = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(content, str):
            found[role] = content
    return found


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The template of its own file, else of `tokenizer_config.json` (one, or a list of named ones of which "default" counts)."""
    own = path / "chat_template.jinja"
    try:
        if own.exists():
            return own.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{own} cannot be read: {error}") from None
    template = {**settings, **read_json(path / "chat_template.json")}.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None

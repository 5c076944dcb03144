"""What has been said: messages for a model with a chat template, one growing text for a model without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvshare.errors import RequestError

if TYPE_CHECKING:
    from kvshare.engine.llm import LLM


class Conversation:
    """The history of a chat. `templated` says whether the model has a chat template."""

    def __init__(self, templated: bool, system: str | None = None):
        self.templated = templated
        self._system: str | None = None
        self.system = system
        self.turns: list[tuple[str, str]] = []  # (message, answer)

    @property
    def system(self) -> str | None:
        """The system prompt. Setting one raises `RequestError` where the model has no place for it."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text and not self.templated:
            raise RequestError("this model has no chat template, and so no place for a system prompt")
        self._system = text

    def prompt(self, llm: LLM, message: str) -> list[int]:
        """Token ids of everything so far with `message` at the end. Raises `RequestError` where the template refuses these messages."""
        if self.templated:
            return llm.chat_prompt([*self.messages(), {"role": "user", "content": message}])
        return llm.tokenizer.encode("".join(f"{said}{answer}\n" for said, answer in self.turns) + message)

    def add(self, message: str, answer: str) -> None:
        self.turns.append((message, answer))

    def clear(self) -> None:
        self.turns.clear()

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates and the OpenAI API have it."""
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for message, answer in self.turns:
            messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        return messages

    def save(self, name: str, model: str) -> Path:
        """Write the messages to a new JSON file. Raises `RequestError` for a name that is missing, taken or cannot be written."""
        if not name:
            raise RequestError("/save needs the name of a file")
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump({"model": model, "messages": self.messages()}, file, ensure_ascii=False, indent=1)
        except FileExistsError:
            raise RequestError(f"{path} exists and was not touched: choose another name") from None
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}") from None
        return path

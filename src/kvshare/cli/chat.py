"""`kvshare chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from kvshare.cli import options
from kvshare.cli.conversation import Conversation
from kvshare.errors import KVShareError, RequestError

if TYPE_CHECKING:
    from kvshare.cli.running import Run
    from kvshare.engine.llm import LLM
    from kvshare.engine.sampling import SamplingParams

_HELP = """\
/help           this text
/clear          start afresh (the system prompt stays)
/system TEXT    set the system prompt; /system alone shows it, /system - removes it
/save FILE      write the conversation as JSON
/quit           leave (or Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one; pasted lines stay one message."""

_PASTE_SECONDS = 0.03  # lines that follow one another faster than this were pasted, not typed


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(show_default="up to the end of the context", help="Most tokens of an answer.")] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    max_context: options.MaxContext = None,
    kv_memory: options.KVMemory = None,
    kv_layout: options.KVLayout = "plain",
    weights: options.Weights = "auto",
    weight_cache: options.WeightCache = True,
    activations: options.Activations = "int16",
    kv_dtype: options.KVDtype = None,
) -> None:
    """Talk to a model.

    Models without a chat template continue the text that you type. Answers go to stdout, everything else to stderr.
    A pipe works too: each line of stdin is a message.
    """
    llm = options.load_llm(model, dtype, max_context, kv_memory, kv_layout, kv_dtype, weights, weight_cache, activations)
    params = llm.default_sampling_params(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
    )
    Chat(llm, params, max_tokens, Conversation(llm.tokenizer.has_chat_template, system)).run()


class Chat:
    """Reads messages and commands until the input ends."""

    def __init__(self, llm: LLM, params: SamplingParams, max_tokens: int | None, conversation: Conversation):
        self.llm, self.params, self.max_tokens, self.conversation = llm, params, max_tokens, conversation
        self.terminal = sys.stdin.isatty()
        self.commands: dict[str, Callable[[str], bool]] = {
            "/help": lambda _: _say(_HELP),
            "/clear": self._clear,
            "/system": self._system,
            "/save": self._save,
            "/quit": lambda _: False,
            "/exit": lambda _: False,
        }

    def run(self) -> None:
        if not self.llm.tokenizer.has_chat_template:
            _say(
                "This model has no chat template: it was trained to continue text, not to answer. What you type is continued as it stands."
            )
        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline

                # Python turns it off for its own prompt; with it a paste of several lines arrives as one
                readline.parse_and_bind("set enable-bracketed-paste on")
            _say(f"context {self.llm.max_context:,} tokens; /help lists the commands, Ctrl-D leaves")
        while (message := self._read()) is not None:
            if message.strip() and not self._handle(message):
                break

    def _handle(self, message: str) -> bool:
        """Run a command or answer a message; False to leave. What goes wrong with one of them does not end the conversation."""
        try:
            return self._run(message)
        except KVShareError as error:
            return _say(str(error))

    def _run(self, message: str) -> bool:
        name, _, argument = message.strip().partition(" ")
        if "\n" in message or not name.startswith("/") or "/" in name[1:]:  # a path is no command
            self._answer(message)
            return True
        if name not in self.commands:
            return _say(f"{name} is no command: /help lists them")
        return self.commands[name](argument.strip())

    def _answer(self, message: str) -> None:
        from kvshare.cli.running import Run, interruptible, show

        prompt = self.conversation.prompt(self.llm, message)
        room = self.llm.max_context - len(prompt)
        if room < 1:
            raise RequestError(_too_long(len(prompt), self.llm.max_context))
        params = replace(self.params, max_tokens=min(room, self.max_tokens or room))
        with interruptible() as interrupt:
            run = Run(self.llm, prompt, params, interrupt)
            for update in run:
                show(update.text)
            show("\n")
        self.conversation.add(message, run.output.outputs[0].text)
        _say(self._status(run))

    def _status(self, run: Run) -> str:
        """Speed, context and cache after an answer, and why it ended if not by itself."""
        from kvshare.cli.running import cache_words

        completion, limit = run.output.outputs[0], self.llm.max_context
        parts = [f"{run.tokens_per_second:.1f} tokens/s"] if run.tokens_per_second else []
        parts += [f"context {run.num_tokens:,} of {limit:,}", cache_words(self.llm, completion)]
        if run.interrupted:
            parts.append("stopped")
        elif completion.finish_reason == "length":
            full = run.num_tokens >= limit
            parts.append(f"cut off: {'the context is full, /clear starts afresh' if full else '--max-tokens reached'}")
        return f"[{' · '.join(parts)}]"

    def _clear(self, _: str) -> bool:
        self.conversation.clear()
        return _say("the conversation starts afresh")

    def _system(self, text: str) -> bool:
        if text:
            self.conversation.system = None if text == "-" else text
        return _say(f"system prompt: {self.conversation.system or 'none'}")

    def _save(self, name: str) -> bool:
        return _say(f"saved to {self.conversation.save(name, self.llm.origin)}")

    def _read(self) -> str | None:
        """The next message, of one line or several; None at the end of the input."""
        lines: list[str] = []
        try:
            while True:
                line = self._line("... " if lines else "> ")
                lines.append(line.removesuffix("\\"))
                if not line.endswith("\\") and not (self.terminal and _more_is_waiting()):
                    return "\n".join(lines)
        except EOFError:
            if self.terminal:
                sys.stderr.write("\n")
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            return "" if _say("\nCtrl-D or /quit leaves") else None

    def _line(self, prompt: str) -> str:
        """One line. A pipe gets no prompt, and a redirected stdout does not either."""
        if self.terminal and not sys.stdout.isatty():
            sys.stderr.write(prompt)
            sys.stderr.flush()
            return input()
        return input(prompt if self.terminal else "")


def _more_is_waiting() -> bool:
    """Whether the next line is there already: it was pasted together with the last one."""
    return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])


def _too_long(tokens: int, limit: int) -> str:
    return (
        f"The conversation with this message has {tokens:,} tokens, but the context holds {limit:,}, answer included. "
        "The message was not taken: shorten it, /clear starts afresh, and --max-context gives more room where the model has it."
    )


def _say(text: str) -> bool:
    """Print for the person, not for the pipe; True, so that commands go on."""
    typer.secho(text, err=True, dim=True)
    return True

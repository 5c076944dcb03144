"""`kvshare generate`: complete a prompt, from the command line, a file or a pipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvshare.cli import options
from kvshare.errors import RequestError

if TYPE_CHECKING:
    from kvshare.cli.running import Run
    from kvshare.engine.llm import LLM
    from kvshare.engine.outputs import CompletionOutput

DEFAULT_MAX_TOKENS = 256


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", show_default=False, help="The text to continue; without it, --file or stdin.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Take the prompt from this file; one newline at its end is dropped.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as a user's message.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(show_default=f"{DEFAULT_MAX_TOKENS}, or what fits", help="Most tokens of the answer.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Answers to the same prompt, in one batch.")] = 1,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on where the model would end.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(metavar="K", help="With --json: log-probabilities of each token and the K most probable ones.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else on stdout.")] = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = "auto",
    max_context: options.MaxContext = None,
    kv_memory: options.KVMemory = None,
    kv_layout: options.KVLayout = "plain",
    weights: options.Weights = "auto",
    weight_cache: options.WeightCache = True,
    activations: options.Activations = "int16",
    kv_dtype: options.KVDtype = None,
) -> None:
    """Complete a prompt.

    The prompt is continued as it stands, for instruction-tuned models too: --chat makes it a message, `kvshare chat` is a conversation.
    The text goes to stdout as it comes, everything else to stderr. Ctrl-C ends the answer (exit status 130).
    """
    if logprobs is not None and not as_json:
        raise RequestError("--logprobs needs --json: there is no place for them beside the text")
    text = _read_prompt(prompt, file)
    llm = options.load_llm(model, dtype, max_context, kv_memory, kv_layout, kv_dtype, weights, weight_cache, activations, max(1, n))
    ids = llm.chat_prompt([{"role": "user", "content": text}]) if chat else llm.tokenizer.encode(text)
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, llm.max_context - len(ids)))
    params = llm.default_sampling_params(
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )

    from kvshare.cli.running import Run, interruptible, show

    with interruptible() as interrupt:
        run = Run(llm, ids, params, interrupt)
        for update in run:
            if n == 1 and not as_json:
                show(update.text)
    if as_json:
        typer.echo(json.dumps(to_json(llm, run), ensure_ascii=False))
    elif n > 1:
        for completion in run.output.outputs:
            typer.secho(f"--- {completion.index + 1} of {n}", err=True, dim=True)
            show(completion.text + "\n")
    else:
        show("\n")
    typer.secho(_summary(llm, run), err=True, dim=True)
    if run.interrupted:
        raise typer.Exit(130)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from where the user put it. Raises `RequestError` where that is nowhere, several places, or no text."""
    if prompt is not None and file is not None:
        raise RequestError("a prompt and --file were given: give one of them")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise RequestError("no prompt: give it behind the model, with --file, or on stdin")
    try:
        data = file.read_bytes() if file is not None else sys.stdin.buffer.read()
        text = data.decode("utf-8")
    except OSError as error:
        raise RequestError(f"--file: {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{file or 'stdin'} is no UTF-8 text (byte {error.start:,}): {error.reason}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _summary(llm: LLM, run: Run) -> str:
    """One line on what it took."""
    from kvshare.cli.running import cache_words

    completions = run.output.outputs
    metrics = completions[0].metrics
    assert metrics is not None
    prompt, tokens = len(run.output.prompt_token_ids), sum(len(completion.token_ids) for completion in completions)
    parts = [f"{prompt:,} prompt tokens in {run.prefill_seconds:.2f} s, {tokens:,} tokens"]
    if run.tokens_per_second is not None:
        parts[0] += f" at {run.tokens_per_second:.1f} tokens/s"
    parts.append(cache_words(llm, completions[0]))
    if metrics.tail_rows_skipped:
        behind = len(llm.layout.layers) - llm.layout.tail
        if behind:
            parts.append(f"{metrics.tail_rows_skipped:,} of {metrics.prompt_rows:,} prompt rows skipped the last {behind} layers")
    slow = llm.engine.runner.decode_steps.reason
    if slow is not None:
        parts.append(f"slower than it could be: decode steps are not replayed ({slow})")
    if run.interrupted:
        parts.append("interrupted")
    elif completions[0].finish_reason == "length":
        parts.append("cut off at --max-tokens" if run.num_tokens < llm.max_context else f"the context of {llm.max_context:,} is full")
    return "; ".join(parts)


def to_json(llm: LLM, run: Run) -> dict[str, Any]:
    """What `--json` prints. With several answers, "completions" has them all and the other keys are the first one's."""
    request = run.output
    first = _completion_json(llm, request.outputs[0])
    tokens = sum(len(completion.token_ids) for completion in request.outputs)
    prompt = len(request.prompt_token_ids)
    result = {
        "model": llm.origin,
        **first,
        "prompt_token_ids": request.prompt_token_ids,
        "usage": {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens},
        "kv_bytes": _kv_json(llm, request.outputs[0]),
        "seconds": {"prefill": round(run.prefill_seconds, 4), "decode": round(run.decode_seconds, 4)},
        "tokens_per_second": run.tokens_per_second and round(run.tokens_per_second, 2),
    }
    if len(request.outputs) > 1:
        result["completions"] = [_completion_json(llm, completion) for completion in request.outputs]
    return result


def _completion_json(llm: LLM, completion: CompletionOutput) -> dict[str, Any]:
    result: dict[str, Any] = {"text": completion.text, "token_ids": completion.token_ids, "finish_reason": completion.finish_reason}
    if completion.logprobs is not None:
        result["logprobs"] = [
            [
                {
                    "token_id": token,
                    "token": llm.tokenizer.decode([token], skip_special=False),
                    "logprob": entry.logprob,
                    "rank": entry.rank,
                }
                for token, entry in alternatives.items()
            ]
            for alternatives in completion.logprobs
        ]
    return result


def _kv_json(llm: LLM, completion: CompletionOutput) -> dict[str, int]:
    metrics = completion.metrics
    assert metrics is not None
    return {
        "total": metrics.kv_bytes,
        "planned": metrics.planned_bytes,
        "held": metrics.held_bytes,
        "peak": metrics.peak_bytes,
        "without_sharing_and_windows": metrics.kv_bytes_without_sharing_and_windows,
        "page": llm.arena.page_bytes,
        "prompt_rows": metrics.prompt_rows,
        "tail_rows_skipped": metrics.tail_rows_skipped,
    }

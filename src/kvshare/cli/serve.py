"""`kvshare serve`: a model behind OpenAI's HTTP API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvshare.cli import options
from kvshare.cli.units import format_bytes
from kvshare.errors import KVShareError, RequestError

if TYPE_CHECKING:
    from kvshare.engine.llm import LLM

_SERVER = "Server"


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, envvar="KVSHARE_MODEL", help=options.MODEL_HELP)],
    host: Annotated[
        str, typer.Option(envvar="KVSHARE_HOST", rich_help_panel=_SERVER, help="Address to listen on; 0.0.0.0 is every network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="KVSHARE_PORT", min=0, max=65535, rich_help_panel=_SERVER, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="KVSHARE_API_KEY",
            metavar="KEY",
            show_default=False,
            show_envvar=True,
            rich_help_panel=_SERVER,
            help="What clients must send as their API key. Other users of this machine see command lines: prefer the variable.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            envvar="KVSHARE_SERVED_MODEL_NAME",
            metavar="NAME",
            show_default="MODEL",
            rich_help_panel=_SERVER,
            help="The name that clients ask for.",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(envvar="KVSHARE_MAX_NUM_SEQS", min=1, max=1024, rich_help_panel=_SERVER, help="Sequences that run in one batch.")
    ] = 16,
    max_queue: Annotated[
        int,
        typer.Option(
            envvar="KVSHARE_MAX_QUEUE",
            min=0,
            max=65536,
            rich_help_panel=_SERVER,
            help="Requests that wait beyond those; the next gets a 429.",
        ),
    ] = 64,
    dtype: options.Dtype = "auto",
    max_context: options.MaxContext = None,
    kv_memory: options.KVMemory = None,
    kv_layout: options.KVLayout = "plain",
    weights: options.Weights = "auto",
    weight_cache: options.WeightCache = True,
    activations: options.Activations = "int16",
    kv_dtype: options.KVDtype = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's API: chat completions, completions, models, and /health.

    It listens at once and answers 503 until the model is loaded. Ctrl-C stops it: running requests get five seconds.
    """
    from kvshare.server.app import create_app
    from kvshare.server.run import address_of, is_loopback, listen, make_server
    from kvshare.server.worker import Worker

    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise RequestError("--api-key: must be printable ASCII characters without spaces around them, and not empty")
    name = served_model_name or model
    sock = listen(host, port)
    local = is_loopback(sock)
    worker = Worker(
        lambda: options.load_llm(
            model, dtype, max_context, kv_memory, kv_layout, kv_dtype, weights, weight_cache, activations, max_num_seqs
        ),
        on_loaded=lambda llm: _say(f"{_describe(llm)}\nready: {address_of(sock)}/v1, model {name!r}; Ctrl-C stops it"),
        on_failed=lambda: setattr(server, "should_exit", True),
    )
    app = create_app(worker, name, max_num_seqs + max_queue, api_key, local_only=local and api_key is None)
    server = make_server(app)
    _say(f"listening on {address_of(sock)}, loading {model}")
    if not local and api_key is None:
        _say("warning: whoever can reach this address can use this server: set KVSHARE_API_KEY, or listen on 127.0.0.1")
    server.run(sockets=[sock])
    if isinstance(worker.failure, KVShareError):
        raise worker.failure
    if worker.failure is not None:
        raise RuntimeError("the engine's thread ended") from worker.failure


def _say(text: str) -> None:
    typer.secho(text, err=True, dim=True)


def _describe(llm: LLM) -> str:
    """The cache that was planned and allocated, and what fits into it."""
    arena, engine = llm.arena, llm.engine
    together = engine.policy.longest_context(engine.scheduler.max_sequences, limit=llm.max_context)
    return (
        f"cache: {format_bytes(arena.num_pages * arena.page_bytes)} in {arena.num_pages:,} pages of {arena.page_bytes:,} bytes; "
        f"context {llm.max_context:,} tokens, or {together:,} in each of {engine.scheduler.max_sequences} sequences at once"
    )

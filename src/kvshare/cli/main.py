"""The `kvshare` command. Verbs are modules that are imported when they are called, so that help and planning start at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvshare import __version__
from kvshare.errors import KVShareError


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb is a function of the verb's name, annotated for Typer, in a module of its own."""

    module: str
    help: str  # one line, for `kvshare --help`


VERBS: Mapping[str, Verb] = {
    "plan": Verb("kvshare.cli.plan", "What a model's cache costs at any context, batch and precision, and what fits."),
    "generate": Verb("kvshare.cli.generate", "Complete a prompt, from the command line, a file or a pipe."),
    "chat": Verb("kvshare.cli.chat", "Talk to a model in the terminal."),
    "demo": Verb("kvshare.cli.demo", "Run the small model that comes with kvshare, and see what its cache does."),
    "serve": Verb("kvshare.cli.serve", "Serve a model over HTTP, with OpenAI's API."),
    "tune": Verb("kvshare.cli.tune", "Choose the precision of each owner's cache: the fewest bytes that keep a model's predictions."),
    "bench": Verb("kvshare.cli.bench", "Measure a model's speed on this machine, beside what the machine could do."),
    "doctor": Verb("kvshare.cli.doctor", "Prove that a model runs right on this machine; without a model, describe the machine."),
}


class LazyGroup(TyperGroup):
    """Lists verbs from the table, and imports a verb's module only when that verb is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        verb = VERBS.get(cmd_name)
        return TyperCommand(cmd_name, help=verb.help) if verb else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name is not None and name in VERBS else command, rest


def _load(name: str) -> Any:
    verb = VERBS[name]
    single = typer.Typer(add_completion=False)
    single.command(name)(getattr(importlib.import_module(verb.module), name))
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"kvshare {__version__}")
        raise typer.Exit


@app.callback()
def kvshare(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Run, serve and size language models whose key-value cache is structured."""


def main() -> None:
    """Entry point: what a user can cause and mend is one line on stderr and exit status 2, never a traceback."""
    try:
        app()
    except KVShareError as error:
        typer.secho(f"kvshare: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

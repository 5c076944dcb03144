"""`kvshare demo`: the small model that comes with kvshare, its plan, its text, and what its cache held."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from kvshare.cli.units import format_bytes
from kvshare.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvshare.cli.running import Run
    from kvshare.engine.llm import LLM

PROMPT_TOKENS = 2000
SHOWN_TOKENS = 40  # of the prompt's end
BAR_WIDTH = 36

_NEXT = """\
  kvshare generate demo "In the beginning"     more of the same
  kvshare doctor demo                          prove that it runs right here
  kvshare plan gemma-4-E2B gemma-4-E4B         what the real ones would cost"""


@dataclass(slots=True)
class Audit:
    """What the arena held after each step, beside what the plan said it would."""

    steps: int = 0
    agreed: int = 0
    tokens: int = 0
    planned: int = 0
    held: int = 0

    def look(self, llm: LLM, tokens: int) -> None:
        self.steps, self.tokens = self.steps + 1, tokens
        self.planned, self.held = llm.layout.held_bytes(tokens, 1, llm.engine.precision), llm.arena.held_bytes
        self.agreed += self.planned == self.held


def demo(
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 160,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 7,
) -> None:
    """Run the small model that comes with kvshare, and see what its cache does.

    It has Gemma 4's structure and was trained on the King James Bible and Python's documentation. It needs neither network nor GPU.
    Exit status: 0 the arena held what was planned, 1 it did not.
    """
    from rich.console import Console
    from rich.text import Text

    from kvshare.checkpoints.resolve import DEMO, locate
    from kvshare.cli.plan_tables import print_report
    from kvshare.cli.running import Run, interruptible, show
    from kvshare.demo import sample_text
    from kvshare.engine.llm import LLM
    from kvshare.planner import plan
    from kvshare.planner.models import resolve

    console = Console(highlight=False)
    path = locate(DEMO)
    llm = LLM(path)
    prompt = llm.tokenizer.encode(sample_text())[:PROMPT_TOKENS]
    room = llm.max_context - len(prompt)
    if max_tokens > room:
        raise RequestError(f"--max-tokens {max_tokens:,}: at most {room:,} fit behind the {len(prompt):,} tokens of the prompt")
    params = llm.default_sampling_params(max_tokens=max_tokens, temperature=temperature, top_p=0.95, seed=seed, ignore_eos=True)

    _heading(console, "The plan", "what the cache will take, from the config alone")
    print_report(plan(replace(resolve(str(path)), name=DEMO), context=len(prompt) + max_tokens - 1, kv_dtype=llm.engine.precision))

    _heading(console, "The text", f"the model reads {len(prompt):,} tokens of the Epistle to the Hebrews and goes on")
    console.print(Text(f"... {llm.tokenizer.decode(prompt[-SHOWN_TOKENS:])}", style="dim"), end="", soft_wrap=True)
    audit = Audit()
    with interruptible() as interrupt:
        run = Run(llm, prompt, params, interrupt)
        for update in run:
            show(update.text)
            if not update.finished:  # then its pages are free again
                audit.look(llm, run.request.sequences[0].cache.num_tokens)
    show("\n")
    if run.interrupted:
        raise typer.Exit(130)

    _heading(console, "The cache", f"after {audit.tokens:,} tokens, in pages of {format_bytes(llm.arena.page_bytes)}")
    console.print(_cache_table(llm, run, audit))
    console.print(Text("\nGo on with", style="bold"))
    console.print(Text(_NEXT))
    if audit.agreed < audit.steps:
        raise typer.Exit(1)


def _heading(console: Console, title: str, remark: str) -> None:
    from rich.rule import Rule
    from rich.text import Text

    console.print()
    console.print(Rule(Text.assemble((title, "bold"), f": {remark}"), align="left"))


def _cache_table(llm: LLM, run: Run, audit: Audit) -> Table:
    """Planned against allocated, what it would be otherwise, and what the tail saved."""
    from rich.table import Table
    from rich.text import Text

    layout, tokens, precision = llm.layout, audit.tokens, llm.engine.precision
    otherwise = {
        "without sharing": layout.without_sharing(),
        "without windows": layout.without_windows(),
        "without either": layout.without_sharing().without_windows(),
    }
    sizes = {name: other.held_bytes(tokens, 1, precision) for name, other in otherwise.items()}
    most = max(audit.held, *sizes.values())

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("what")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("remark")
    verdict = (
        f"equal after each of {audit.steps} steps" if audit.agreed == audit.steps else f"NOT equal in {audit.steps - audit.agreed} steps"
    )
    table.add_row("planned", f"{audit.planned:,} B")
    table.add_row("allocated", f"{audit.held:,} B", Text(verdict, style="bold green" if audit.agreed == audit.steps else "bold red"))
    for name, size in {"as it is": audit.held, **sizes}.items():
        style = "green" if size == audit.held else "red"
        table.add_row(name, format_bytes(size), Text.assemble(("█" * round(BAR_WIDTH * size / most), style), f" {size / audit.held:.1f}x"))
    metrics = run.output.metrics
    assert metrics is not None
    behind, layers = len(layout.layers) - layout.tail, len(layout.layers)
    table.add_row(
        "skipped",
        f"{metrics.tail_rows_skipped:,} rows",
        f"of {metrics.prompt_rows:,} of the prompt, in {behind} of {layers} layers",
    )
    speed = f"{metrics.prompt_rows / run.prefill_seconds:,.0f} tokens/s reading"
    if run.tokens_per_second is not None:
        speed += f", {run.tokens_per_second:,.0f} tokens/s writing"
    table.add_row("speed", "", speed)
    return table

"""Peak memory of a long context, anonymous and file-backed apart, beside what the plan allows.

    python -m benchmarks.long_context MODEL [--weights int4] [--contexts 8192,131072] [--last 2048] [--json memory.json]

A process of its own first imports torch and loads the tokenizer: its anonymous memory then is the base. It goes on to load the weights, to
prefill a prompt of random tokens and to decode some; meanwhile /proc/PID/status is read every few milliseconds from outside. Anonymous
memory cannot be given up by the system; the pages of mapped weights can, and are counted apart. The bar: at the peak no more anonymous
memory above the base than the weights, the plan's peak of the cache at that chunk, and 300 MB.

A step needs the more memory the longer the context before it is. So `--last N` computes only the first chunk and the last N tokens: the
pages of those between are taken and written as a prefill does, but with zeros, in seconds where 128K tokens of prefill take many minutes.
Without it everything is computed.
"""

from __future__ import annotations

import argparse
import json
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvshare.errors import KVShareError

ALLOWANCE = 300_000_000  # bytes beyond weights and cache
DECODED = 16  # tokens behind the prompt
SAMPLE_SECONDS = 0.005
TITLE = "peak anonymous memory above the base, MB; files are mapped pages that were in memory"
PHASES = ("base", "load", "prefill", "decode")


def run(model: str, weights: str, context: int, chunk: int, kv_dtype: str | None, last: int | None) -> None:
    """The process that is watched. Says on stdout which phase it has finished, and waits to be told to go on."""

    def finished(phase: str, **figures: Any) -> None:
        print(json.dumps({"phase": phase, **figures}), flush=True)
        sys.stdin.readline()

    import torch

    from kvshare.checkpoints import open_checkpoint

    tokenizer = open_checkpoint(model).tokenizer()
    finished("base", vocabulary=len(tokenizer.encode("a")))
    from kvshare import LLM, SamplingParams
    from kvshare.checkpoints.progress import progress_bar

    llm = LLM(model, weights=weights, max_context=context + DECODED + 1, max_sequences=1, chunk=chunk, kv_dtype=kv_dtype)
    finished("load", weight_bytes=weight_bytes(llm.model))
    ids = torch.randint(5, llm.model.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    request = llm.engine.add(ids, SamplingParams(temperature=0, max_tokens=DECODED + 1, ignore_eos=True))
    sequence = llm.engine.requests[request].sequences[0]
    if last is not None:
        llm.engine.step()  # the first chunk, with which the scheduler takes the sequence in
        fill(sequence.cache, context - last - sequence.cache.num_tokens, chunk)
    begun = time.perf_counter()
    with progress_bar(f"prompt of {context:,}", unit="tokens") as progress:
        while not sequence.output.token_ids:
            llm.engine.step()
            progress(min(context, sequence.cache.num_tokens), context)
    planned = llm.layout.peak_bytes(context, 1, llm.engine.precision, chunk)
    finished("prefill", seconds=time.perf_counter() - begun, cache_bytes=llm.arena.peak_bytes, planned_bytes=planned)
    begun = time.perf_counter()
    while llm.engine.has_work:
        llm.engine.step()
    finished("decode", seconds=time.perf_counter() - begun)


def fill(cache: Any, count: int, chunk: int) -> None:
    """Let a sequence have `count` tokens whose rows are zeros, taken in chunks and written to the pages as they come."""
    written = set[int]()
    for start in range(0, count, chunk):
        taken = min(chunk, count - start)
        cache.reserve(taken)
        held = {page for table in cache.tables.values() for page in table.pages}
        for page in held - written:
            cache.arena.pages[page].zero_()
        written = held
        cache.commit(taken)


def weight_bytes(model: Any) -> int:
    """All weights as they are stored, mapped or not."""
    import torch

    from kvshare.checkpoints.gguf_blocks import PackedBlocks
    from kvshare.kernels.quantized_weight import QuantizedWeight

    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, QuantizedWeight):
                parts = [part if isinstance(part, torch.Tensor) else part.blocks for part in value.parts]
            else:
                parts = [value.blocks] if isinstance(value, PackedBlocks) else []
            held |= {part.data_ptr(): part.nbytes for part in parts}
    return sum(held.values())


def memory_of(pid: int) -> dict[str, int]:
    """Bytes in memory: of the process alone, and of mapped files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines) if name.startswith("Rss")}
    return {"anonymous": found.get("RssAnon", 0), "files": found.get("RssFile", 0)}  # one that has just ended has neither


def watch(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Call `run` in a process of its own: for each phase what it said, and its peaks."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.long_context", "--run", json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    selector, phases, peak = selectors.DefaultSelector(), {}, {"anonymous": 0, "files": 0}
    selector.register(process.stdout, selectors.EVENT_READ)
    while len(phases) < len(PHASES):
        said = selector.select(SAMPLE_SECONDS)
        now = memory_of(process.pid)
        peak = {kind: max(peak[kind], now[kind]) for kind in peak}
        if said:
            text = process.stdout.readline()
            if not text:
                raise SystemExit(f"the run ended early, behind the phases {list(phases)}")
            line = json.loads(text)
            phases[line.pop("phase")] = {**line, **peak, "end": now}
            peak = now
            process.stdin.write(b"\n")
            process.stdin.flush()
    process.wait()
    return {**settings, "phases": phases, **_verdict(phases)}


def _verdict(phases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    base = phases["base"]["end"]["anonymous"]
    above = max(phases[phase]["anonymous"] for phase in PHASES[1:]) - base
    bar = phases["load"]["weight_bytes"] + phases["prefill"]["planned_bytes"] + ALLOWANCE
    return {"base_bytes": base, "above_base_bytes": above, "bar_bytes": bar, "within": above <= bar}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory, a GGUF file, or the name of weights in an installed package")
    parser.add_argument("--weights", default="int4", help="as in kvshare generate")
    parser.add_argument("--kv-dtype", help="as in kvshare generate")
    parser.add_argument("--contexts", default="8192", help="tokens of the prompts, one run each")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--last", type=int, help="compute only so many tokens at the end of each prompt; all by default")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(**json.loads(options.run))
        return
    if options.model is None:
        parser.error("which model?")
    contexts = [int(context) for context in options.contexts.split(",")]
    same = {"model": options.model, "weights": options.weights, "chunk": options.chunk, "kv_dtype": options.kv_dtype, "last": options.last}
    rows = [watch({**same, "context": context}) for context in contexts]
    if options.json:
        kept = [{key: value for key, value in row.items() if key != "model"} for row in rows]  # a path says nothing elsewhere
        options.json.write_text(json.dumps({"model": Path(options.model).name, "rows": kept}, indent=1) + "\n")
    Console().print(summary(rows))
    sys.exit(0 if all(row["within"] for row in rows) else 1)


COLUMNS = ("context", "base", *PHASES[1:], "bar", "weights", "cache, planned", "cache, measured", "files", "computed", "prefill s")


def summary(rows: list[dict[str, Any]]) -> Table:
    """In MB (10^6 bytes)."""
    table = Table(title=TITLE)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown(document: Mapping[str, Any]) -> str:
    """The same from what `--json` wrote."""
    rows = document["rows"]
    of = f"{document['model']}, {rows[0]['weights']} weights, {rows[0]['kv_dtype'] or '16-bit'} cache"
    lines = [f"**Memory**, {of}: {TITLE}", ""]
    cells = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(row) for row in rows)]
    return "\n".join(lines + [f"| {' | '.join(each)} |" for each in cells])


def _cells(row: Mapping[str, Any]) -> list[str]:
    phases, base = row["phases"], row["base_bytes"]
    sizes = [base, *(phases[phase]["anonymous"] - base for phase in PHASES[1:]), row["bar_bytes"], phases["load"]["weight_bytes"]]
    sizes += [phases["prefill"]["planned_bytes"], phases["prefill"]["cache_bytes"], max(phases[phase]["files"] for phase in PHASES)]
    computed = "all" if row["last"] is None else f"last {row['last']:,}"
    return [f"{row['context']:,}", *(f"{size / 1e6:,.0f}" for size in sizes), computed, f"{phases['prefill']['seconds']:.0f}"]


if __name__ == "__main__":
    try:
        main()
    except KVShareError as error:
        sys.exit(f"benchmarks.long_context: {error}")

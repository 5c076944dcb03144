"""What quantizing the weights does to a model's predictions: KL from the plain weights, in nats a token, on text that you name.

    python -m benchmarks.weight_divergence MODEL --text FILE [--tokens 1024] [--window 512]

Both are computed in float32, the cache is not rounded: only the weights differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvshare import LLM
from kvshare.cache.step import DenseStep
from kvshare.doctor.comparison import compare
from kvshare.evaluation.perplexity import text_windows


@torch.inference_mode()
def hidden(llm: LLM, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Hidden states [tokens, hidden] of each window."""
    return [llm.model(torch.tensor(list(ids)), DenseStep(llm.layout, [len(ids)])) for ids in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, a GGUF file, or the name of weights in an installed package")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()

    plain = LLM(options.model, dtype="float32", max_context=options.window, max_sequences=1)
    windows = text_windows(plain.tokenizer, options.text.read_text(encoding="utf-8"), options.window)[: options.tokens // options.window]
    expected = hidden(plain, windows)
    table = Table(title=f"{options.model}: {sum(map(len, windows)):,} tokens of {options.text.name}")
    for column in ("weights", "KL", "same top token"):
        table.add_column(column, justify="right")
    for precision in ("int8", "int4"):
        llm = LLM(options.model, dtype="float32", weights=precision, weight_cache=False, max_context=options.window, max_sequences=1)
        found = compare(plain.model.logits, torch.cat(expected), torch.cat(hidden(llm, windows)), llm.model.logits)
        table.add_row(precision, f"{found.divergence / found.rows:.2g}", f"{1 - found.other_tokens / found.rows:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()

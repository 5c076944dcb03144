"""What quantizing the weights does to a model's predictions: KL from the plain weights, in nats a token, on text that you name.

    python -m benchmarks.weight_divergence MODEL --text FILE [--tokens 1024] [--window 512] [--dither]

Both are computed in float32, the cache is not rounded: only the weights differ. Beside it the KL of activations rounded to int8 wherever
they meet blocks, from the same weights. A file of blocks is measured as it is (`native`).

Weights out of a file of 4-bit blocks lie on a grid, and another grid of blocks fits them better than it would fit a model's own. `--dither`
moves each weight of a linear layer by a random part of its step first, half a step at the most. Such figures compare ways of quantizing and
are no model's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import unpacked
from kvshare import LLM
from kvshare.cache.step import DenseStep
from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.block_layers import has_blocks
from kvshare.checkpoints.resolve import locate
from kvshare.doctor.comparison import Head, compare
from kvshare.doctor.watched import Watched
from kvshare.evaluation.perplexity import text_windows
from kvshare.kernels.quantized_weight import ROWS_IN_BLOCKS

GROUP = 32  # numbers that share a step, in every format of blocks


@torch.inference_mode()
def hidden(llm: LLM, windows: Sequence[Sequence[int]]) -> torch.Tensor:  # -> [tokens, hidden]
    """Hidden states of all windows, each in one step: activations are not rounded."""
    return torch.cat([llm.model(torch.tensor(list(ids)), DenseStep(llm.layout, [len(ids)])) for ids in windows])


def rounded_hidden(llm: LLM, windows: Sequence[Sequence[int]]) -> torch.Tensor:  # -> [tokens, hidden]
    """The same in steps of few tokens, whose activations are rounded."""
    sizes = [[len(part) for part in torch.tensor(list(ids)).split(ROWS_IN_BLOCKS)] for ids in windows]
    runs = (Watched(llm.model, "fp32", 1, len(ids)) for ids in windows)
    return torch.cat([run.run(ids, each) for run, ids, each in zip(runs, windows, sizes, strict=True)])


def rounded_logits(llm: LLM) -> Head:
    return lambda rows: torch.cat([llm.model.logits(part) for part in rows.split(ROWS_IN_BLOCKS)])


def dithered(weight: torch.Tensor) -> torch.Tensor:  # [out_features, in_features]
    """Numbers off the grid that each 32 of a row lie on, whose step is the least distance of two of them."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    gaps = groups.sort(-1).values.diff(dim=-1)
    steps = gaps.masked_fill(gaps <= 1e-3 * gaps.amax(-1, keepdim=True), torch.inf).amin(-1, keepdim=True)
    noise = torch.rand(groups.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return (groups + noise * steps.nan_to_num(posinf=0.0)).flatten(-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, a GGUF file, or the name of weights in an installed package")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dither", action="store_true", help="take the weights of a GGUF file off its grid first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        model = str(unpacked(locate(options.model), Path(where), dithered)) if options.dither else options.model
        measure(model, options)


def measure(model: str, options: argparse.Namespace) -> None:
    """Print the divergence of `model`, tokens as `options.model` reads the text."""
    loading: dict[str, Any] = {"dtype": "float32", "max_context": options.window, "max_sequences": 1, "weight_cache": False}
    plain = LLM(model, **loading)
    tokenizer = open_checkpoint(options.model).tokenizer()
    windows = text_windows(tokenizer, options.text.read_text(encoding="utf-8"), options.window)[: options.tokens // options.window]
    exact = hidden(plain, windows)
    table = Table(title=f"{options.model}: {sum(map(len, windows)):,} tokens of {options.text.name}")
    for column in ("weights", "KL", "same top token", "KL of int8 activations", "same top token"):
        table.add_column(column, justify="right")
    for precision in ("native", "int8", "int4"):
        llm = LLM(model, **loading, weights=precision)
        if not has_blocks(llm.model):  # nothing is native
            continue
        blocks = hidden(llm, windows)
        found = [compare(plain.model.logits, exact, blocks, llm.model.logits)]
        rounded = LLM(model, **loading, weights=precision, activations="int8")
        found.append(compare(llm.model.logits, blocks, rounded_hidden(rounded, windows), rounded_logits(rounded)))
        table.add_row(
            precision,
            *(cell for each in found for cell in (f"{each.divergence / each.rows:.2g}", f"{1 - each.other_tokens / each.rows:.3f}")),
        )
        if precision == "native":  # the others would leave these blocks as they are
            break
    Console().print(table)


if __name__ == "__main__":
    main()

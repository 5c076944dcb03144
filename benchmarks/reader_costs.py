"""Who pays for an owner's precision, its readers or itself? python -m benchmarks.reader_costs MODEL [--text FILE]

Several layers read one owner's rows, and whether an owner is dear because of them or because of where it stands cannot be told from what
it costs as a whole. So each layer is given encoded rows alone, while all others read exact ones (rows are replaced in plain torch, as in
`benchmarks.cache_schemes`). Printed is the KL divergence from exact rows, nats a token: where only the owner reads encoded rows, where only
its readers do, where all of them do, and that divided by how many they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cache_schemes import Scheme, SchemeStep
from kvshare import LLM
from kvshare.checkpoints.resolve import locate
from kvshare.demo import sample_text
from kvshare.evaluation.perplexity import HEAD_ROWS, text_windows
from kvshare.layout import CacheLayout
from kvshare.models.model import Model


class PartlyEncoded(SchemeStep):
    """A step in which some layers read encoded rows, and the others the same rows as they were."""

    def __init__(self, layout: CacheLayout, length: int, scheme: Scheme, balance: Mapping[int, Tensor], losing: Collection[int]):
        super().__init__(layout, length, scheme, balance, {})
        self.losing, self.whole = losing, scheme

    def attend(self, layer: int, q: Tensor, **options: Any) -> Tensor:
        self.scheme = self.whole if layer in self.losing else None
        out = super().attend(layer, q, **options)
        self.scheme = self.whole
        return out


@torch.inference_mode()
def cost(model: Model, windows: list[list[int]], scheme: Scheme, cases: list[tuple[int, ...]]) -> list[float]:
    """KL of each case, a set of layers that read encoded rows."""
    balance, totals = model.key_balance(), [0.0] * len(cases)
    for ids in windows:
        hidden = [model(torch.tensor(ids), PartlyEncoded(model.layout, len(ids), scheme, balance, case)) for case in ((), *cases)]
        for start in range(0, len(ids), HEAD_ROWS):
            p, *others = (torch.log_softmax(model.logits(each[start : start + HEAD_ROWS]).float(), -1) for each in hidden)
            for index, q in enumerate(others):
                totals[index] += (p.exp() * (p - q)).sum().item()
    return [total / sum(map(len, windows)) for total in totals]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reader_costs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="as `kvshare generate` takes it")
    parser.add_argument("--scheme", default="rot4", help="how rows are encoded, as in benchmarks.cache_schemes")
    parser.add_argument("--text", type=Path, help="the text to measure on; the Epistle to the Hebrews if left out")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256, help="tokens that are run together")
    arguments = parser.parse_args()
    llm = LLM(locate(arguments.model), dtype="float32", max_context=arguments.window, max_sequences=1, progress=False)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else sample_text()
    windows = text_windows(llm.tokenizer, text, arguments.window)[: max(1, arguments.tokens // arguments.window)]
    owners = [(owner, llm.layout.readers(owner)) for owner in llm.layout.owners]
    cases = [case for owner, readers in owners for case in ((owner,), readers, (owner, *readers))]
    found = cost(llm.model, windows, Scheme.named(arguments.scheme), cases)
    print(f"{arguments.model}, {arguments.scheme}, {sum(map(len, windows)):,} tokens")
    print(" owner  attention  readers  only itself  only readers      all  all / layers that read")
    for place, (owner, readers) in enumerate(owners):
        alone, others, whole = found[3 * place : 3 * place + 3]
        kind = llm.layout.layers[owner].kind
        print(f"{owner:6}  {kind:9}  {len(readers):7}  {alone:11.1e}  {others:12.1e}  {whole:7.1e}  {whole / (1 + len(readers)):.1e}")


if __name__ == "__main__":
    main()

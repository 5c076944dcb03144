"""What ways of storing a cache cost a model's predictions, measured beside the engine: python -m benchmarks.cache_schemes MODEL

A scheme says how keys and values are spelled, how many of the newest and of the first rows stay exact, and whether keys are stored less
their mean. Rows are replaced in place by what a codec makes of them, in plain torch, so a scheme can be tried before it is built. Printed
is the KL divergence from a cache of bfloat16 rows (nats a token, computed in float32), and the bits that a number takes in a long context.

    rot4            both streams in a codec of `kvshare.cache.codecs`
    rot8/rot4       keys in one, values in another
    kivi4:32        keys per channel: 4 bits, a scale and a minimum for each channel of 32 rows that follow one another (KIVI, Liu and
                    others 2024, arXiv:2402.02750); rows of a group that is not complete are exact; values in int4
    rot4+32         each query reads the newest 32 rows exact
    rot4@4          each query reads the first 4 rows exact; rot4@4f: not in windows
    rot4-mean       keys less their mean over another text, which changes no softmax; rot4-ownmean: over the same text
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvshare import LLM
from kvshare.cache.codecs import codec_for
from kvshare.cache.step import DenseStep, KeyRebuild
from kvshare.checkpoints.resolve import locate
from kvshare.demo import sample_text
from kvshare.evaluation.perplexity import HEAD_ROWS, text_windows
from kvshare.layout import CacheLayout, Stream
from kvshare.layout.rows import precision_named
from kvshare.models.model import Model

_SPELLING = re.compile(
    r"(?P<keys>[a-z0-9:]+)(/(?P<values>[a-z0-9]+))?(\+(?P<newest>\d+))?(@(?P<first>\d+)(?P<full>f)?)?(?P<mean>-(own)?mean)?"
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How rows are stored; `mean` is "", "-mean" or "-ownmean"."""

    keys: str
    values: str
    newest: int = 0
    first: int = 0
    mean: str = ""
    full_only: bool = False  # the first rows: not in windows

    @classmethod
    def named(cls, name: str) -> Scheme:
        found = _SPELLING.fullmatch(name)
        if found is None:
            raise SystemExit(f"{name!r} is no scheme: rot4, rot8/rot4, kivi4:32, with +32, @4, -mean or -ownmean behind it")
        values = found["values"] or ("int4" if found["keys"].startswith("kivi") else found["keys"])
        return cls(found["keys"], values, int(found["newest"] or 0), int(found["first"] or 0), found["mean"] or "", bool(found["full"]))

    @property
    def group(self) -> int:
        """Rows that are encoded together."""
        return int(self.keys.split(":")[1]) if self.keys.startswith("kivi") else 1

    def bits(self, stream: Stream) -> float:
        """Bits of a stored number in a long context."""
        if stream.name == "k" and self.group > 1:
            return int(self.keys[4]) + 32 / self.group
        form = precision_named(self.keys if stream.name == "k" else self.values)
        return 8 * stream.row_bytes(form) / (stream.heads * stream.width)

    def encoded(self, stream: Stream, values: Tensor, balance: Tensor | None) -> Tensor:  # [rows, heads, width]
        """Rows as they are read again."""
        if stream.name == "k" and self.group > 1:
            return per_channel(values, int(self.keys[4]), self.group)
        codec = codec_for(precision_named(self.keys if stream.name == "k" else self.values), stream, balance)
        return codec.decode(codec.encode(values), stream.heads, stream.width).float()


def per_channel(keys: Tensor, bits: int, group: int) -> Tensor:  # [rows, heads, width]
    """Keys with a float16 scale and minimum for each channel of `group` rows; a last group that is not complete stays."""
    whole = len(keys) // group * group
    groups = keys[:whole].unflatten(0, (-1, group))
    low, high = groups.aminmax(dim=1, keepdim=True)
    low, scale = low.half().float(), ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
    codes = ((groups - low) / scale).round().clamp(0, 2**bits - 1)
    return torch.cat([(codes * scale + low).flatten(0, 1), keys[whole:]])


class SchemeStep(DenseStep):
    """A step whose queries read rows as a scheme has them: encoded ones, and exact ones among the newest and the first."""

    def __init__(self, layout: CacheLayout, length: int, scheme: Scheme | None, balance: Mapping[int, Tensor], means: Mapping[int, Tensor]):
        super().__init__(layout, [length])
        self.scheme, self.balance, self.means = scheme, balance, means
        self.sums: dict[int, Tensor] = {}  # by owner, of its keys [heads, width]
        self._encoded: dict[tuple[int, str], Tensor] = {}

    def _write(self, layer: int, stream: Stream, sequence: int, first: int, values: Tensor) -> None:
        exact = values.bfloat16().float()
        self._rows[layer, stream.name, sequence] = exact
        mean = torch.zeros(1)
        if stream.name == "k":
            self.sums[layer] = exact.mean(0)
            if self.scheme and self.scheme.mean:
                mean = self.means[layer] if self.scheme.mean == "-mean" else self.sums[layer]
        if self.scheme:
            self._encoded[layer, stream.name] = self.scheme.encoded(stream, exact - mean, self.balance.get(layer)) + mean

    def _attend_sequence(
        self,
        owner: int,
        sequence: int,
        q: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        entries: Tensor | None,
        rebuild: KeyRebuild | None,
    ) -> Tensor:
        if self.scheme is None:
            return super()._attend_sequence(owner, sequence, q, scale, softcap, sinks, entries, rebuild)
        if {stream.name for stream in self.layout.layers[owner].streams} != {"k", "v"} or sinks is not None:
            raise SystemExit(f"layer {owner} does not store keys and values alone: no scheme can be tried on it")
        exact = [self._rows[owner, name, sequence] for name in ("k", "v")]
        coded = [self._encoded[owner, name] for name in ("k", "v")]
        end = self.positions[:, None] + 1  # [queries, 1]
        row = torch.arange(len(exact[0]))[None]
        window = self.layout.layers[owner].stream("k").window
        seen = (row < end) & (row >= end - window if window else True)
        newest = row >= (end - self.scheme.newest) // self.scheme.group * self.scheme.group
        first = row < (self.scheme.first if not self.scheme.full_only or window is None else 0)
        plain = (newest | first)[:, None, None]  # [queries, 1, 1, rows]
        groups = q.unflatten(1, (exact[0].shape[1], -1))  # [queries, kv_heads, group, width]
        scores = [torch.einsum("tkgd,nkd->tkgn", groups, rows) for rows in (exact[0], coded[0])]
        score = torch.where(plain, *scores) * scale
        score = softcap * torch.tanh(score / softcap) if softcap else score
        weights = score.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        sums = [torch.einsum("tkgn,nkd->tkgd", weights * part, rows) for part, rows in ((plain, exact[1]), (~plain, coded[1]))]
        return (sums[0] + sums[1]).flatten(1, 2)


@torch.inference_mode()
def measure(model: Model, windows: Sequence[list[int]], other: list[int], names: Sequence[str], every: int) -> dict[str, float]:
    """KL of each scheme, over every `every`-th position of the windows."""
    balance = model.key_balance()

    def hidden(ids: list[int], scheme: Scheme | None, means: Mapping[int, Tensor]) -> tuple[Tensor, SchemeStep]:
        step = SchemeStep(model.layout, len(ids), scheme, balance, means)
        return model(torch.tensor(ids), step)[::every], step

    means = hidden(other, None, {})[1].sums
    totals, positions = dict.fromkeys(names, 0.0), 0
    for ids in windows:
        expected, _ = hidden(ids, None, {})
        found = {name: hidden(ids, Scheme.named(name), means)[0] for name in names}
        for start in range(0, len(expected), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            p = torch.log_softmax(model.logits(expected[rows]).float(), -1)
            for name, states in found.items():
                q = torch.log_softmax(model.logits(states[rows]).float(), -1)
                totals[name] += (p.exp() * (p - q)).sum().item()
        positions += len(expected)
    return {name: total / positions for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_schemes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="as `kvshare generate` takes it")
    parser.add_argument("schemes", nargs="+")
    parser.add_argument("--text", type=Path, help="the text to measure on; the Epistle to the Hebrews if left out")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024, help="tokens that are run together")
    parser.add_argument("--every", type=int, default=2, help="logits are compared at every so many positions")
    arguments = parser.parse_args()
    llm = LLM(locate(arguments.model), dtype="float32", max_context=arguments.window, max_sequences=1, progress=False)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else sample_text()
    windows = text_windows(llm.tokenizer, text, arguments.window)
    chosen = windows[: max(1, arguments.tokens // arguments.window)]
    found = measure(llm.model, chosen, windows[-2], arguments.schemes, arguments.every)
    streams = [stream for owner in llm.layout.owners for stream in llm.layout.layers[owner].streams]
    numbers = sum(stream.heads * stream.width for stream in streams)
    for name, kl in found.items():
        bits = sum(Scheme.named(name).bits(stream) * stream.heads * stream.width for stream in streams) / numbers
        print(f"{arguments.model}  {name:22} {bits:5.2f} bits  KL {kl:.1e}")


if __name__ == "__main__":
    main()

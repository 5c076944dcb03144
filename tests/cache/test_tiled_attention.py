"""A step's attention through the kernels equals that of plain torch on the same pages, for every kind of layer that they take."""

from __future__ import annotations

import pytest
import torch

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.step import Step
from kvshare.cache.tables import SequenceCache
from kvshare.cache.tiled_attention import attended_kinds
from kvshare.layers.key_from_value import KeyFromValue, KeyRotations, rotated_part
from kvshare.layers.norm import RMSNorm
from kvshare.layers.rotary import frequencies
from kvshare.layout import CacheLayout, LayerCache, Stream
from kvshare.layout.rows import BlockRow

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

NATIVE = BlockRow(8, 32, exact=16, align=8)
WINDOW = Stream("kv", 1, 64, window=16, native=NATIVE)
INDEX = Stream("index", 1, 32, tokens_per_row=4, native=BlockRow(4, 32))
LAYERS = (
    LayerCache("full", 0, (Stream("k", 2, 32), Stream("v", 2, 48))),
    LayerCache("sliding", 1, (Stream("k", 1, 64, window=20), Stream("v", 1, 64, window=20))),
    LayerCache("full", 0),  # a reader
    LayerCache("latent", 3, (Stream("latent", 1, 72),)),
    LayerCache("hca", 4, (WINDOW, Stream("entry", 1, 64, tokens_per_row=8, native=NATIVE))),
    LayerCache("csa", 5, (WINDOW, Stream("entry", 1, 64, tokens_per_row=4, top_k=5, native=NATIVE), INDEX)),
)
LAYOUT = CacheLayout(LAYERS)
HEADS = 60


@pytest.mark.parametrize("precision", ["bf16", "int8", "rot9", "rot4", "native", "rot4+7", "int4+5", "fp8+18", "rot3+33"])
@torch.no_grad()
def test_kernels_and_torch_read_the_same_pages_alike(precision: str) -> None:
    """Chunks, single queries, a sequence without tokens, and the rows that go on behind the last owner."""
    generator = torch.Generator().manual_seed(1)
    arena = Arena(800, LAYOUT.page_bytes(precision))
    arena.pages.fill_(0xFF)
    balance = {owner: (2.0 ** torch.randint(-1, 2, shape, generator=generator)).bfloat16() for owner, shape in ((0, (2, 32)), (1, (1, 64)))}
    cache, caches = PagedCache(LAYOUT, precision, balance), [SequenceCache(LAYOUT, arena, precision) for _ in range(3)]
    for counts in ((50, 1, 7), (1, 33, 1), (9, 0, 1), (1, 1, 1), (40, 1, 130), (1, 1, 1)):
        for each, count in zip(caches, counts, strict=True):
            each.reserve(count)
        step = PagedStep(cache, caches, counts, [min(3, sum(counts) - 2), sum(counts) - 1])
        for layer, described in enumerate(LAYERS):
            if described.streams:
                rows = {}
                for stream in described.streams:
                    ends = [step.new_rows(stream, sequence) for sequence in range(3)]
                    rows[stream.name] = torch.randn(
                        sum(end - first for first, end in ends), stream.heads, stream.width, generator=generator
                    )
                step.append(layer, {name: values.bfloat16() for name, values in rows.items()})
            for seen in (step, step.tail()):
                streams = LAYERS[LAYOUT.owner[layer]].streams
                q = torch.randn(len(seen.positions), HEADS, streams[0].width, generator=generator).bfloat16()
                entries = None
                if described.kind == "csa":
                    entries = torch.stack([_choice(int(position) // 4, generator) for position in seen.positions + 1])
                    asked = (
                        torch.randn(len(seen.positions), 8, 32, generator=generator),
                        torch.randn(len(seen.positions), 8, generator=generator),
                    )
                    chosen = seen.select(layer, asked[0].bfloat16(), asked[1], 5, 0.5)
                    wanted_rows = seen.select(layer, asked[0].bfloat16().float(), asked[1], 5, 0.5)
                    if wanted_rows is None:  # single queries are given all rows that they see, which a replayed step need not know
                        assert chosen is None or chosen.tolist() == [_first(int(position + 1) // 4) for position in seen.positions]
                    elif chosen is not None and precision in ("bf16", "native"):
                        assert torch.equal(chosen, wanted_rows)  # else keys or queries are rounded to bfloat16 on the way, which may decide
                sinks = torch.randn(HEADS, generator=generator) if layer % 2 else None
                got = seen.attend(layer, q, scale=0.1, sinks=sinks, entries=entries)
                wanted = Step.attend(seen, layer, q.float(), scale=0.1, sinks=sinks, entries=entries)
                assert got.shape == wanted.shape
                # rotated rows are rounded once more, and single queries of int8 keys to eight bits
                bound = 2.0**-4 if precision.startswith("rot") else 2.0**-5 if precision == "int8" else 2.0**-6
                assert (got.float() - wanted).abs().max() < bound
        for each, count in zip(caches, counts, strict=True):
            each.commit(count)


def _first(complete: int) -> list[int]:
    return [row if row < complete else -1 for row in range(5)]


def _choice(complete: int, generator: torch.Generator) -> torch.Tensor:  # [5] of the complete entries, -1 for none
    chosen = torch.randperm(complete, generator=generator)[:5].sort().values
    return torch.cat([chosen, torch.full((5 - len(chosen),), -1)])


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("names", [("v",), ("v", "k_rotated")])
@torch.no_grad()
def test_keys_that_follow_from_values_are_rebuilt_in_the_kernel(names: tuple[str, ...], precision: str) -> None:
    """A prompt in chunks, then single queries: the numbers of keys that torch rebuilds, so only sums differ."""
    generator, rotations = (
        torch.Generator().manual_seed(3),
        KeyRotations(frequencies({"rope_type": "proportional", "partial_rotary_factor": 0.25}, 64)),
    )
    norm = RMSNorm(64, 1e-6)
    norm.weight = torch.nn.Parameter((1 + torch.rand(64, generator=generator)).bfloat16())
    rebuild, widths = KeyFromValue(norm, rotations), {"v": 64, "k_rotated": 16}
    layout = CacheLayout((LayerCache("full", 0, tuple(Stream(name, 2, widths[name]) for name in names)),))
    arena = Arena(200, layout.page_bytes(precision))
    arena.pages.fill_(0xFF)
    cache, sequence = PagedCache(layout, precision), SequenceCache(layout, arena, precision)
    for count in (130, 1, 37, 1):
        sequence.reserve(count)
        step = PagedStep(cache, [sequence], [count])
        v = torch.randn(count, 2, 64, generator=generator).bfloat16()
        rows = {"v": v, "k_rotated": rotated_part(rebuild({"v": v}, step.positions), rotations.moving)}
        step.append(0, {name: rows[name] for name in names})
        q = torch.randn(count, 16, 64, generator=generator).bfloat16()
        got = step.attend(0, q, scale=0.1, rebuild=rebuild)
        wanted = Step.attend(step, 0, q, scale=0.1, rebuild=rebuild)
        assert (got.float() - wanted.float()).abs().max() < 2.0**-5
        assert cache.tiled_attention.of(0, arena) is not None
        sequence.commit(count)


def test_what_the_kernels_leave_to_torch() -> None:
    assert not attended_kinds(LayerCache("full", 0, (Stream("k", 1, 7), Stream("v", 1, 7))))  # pairs of numbers
    assert not attended_kinds(LayerCache("full", 0, (Stream("k", 1, 8, window=4), Stream("v", 1, 8))))
    assert not attended_kinds(LayerCache("csa2", 0, (WINDOW,), borrowed=((0, WINDOW),)))

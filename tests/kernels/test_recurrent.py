"""Layers that carry a state, and the products and sums between them, equal their twins in plain torch in every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from kernels.twins import DTYPES, Both, assert_equal, random
from torch import Tensor, nn

from kvshare import kernels
from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.tables import SequenceCache
from kvshare.kernels import group_products
from kvshare.layers.activations import gelu
from kvshare.layers.causal_conv import CausalWindows
from kvshare.layers.compressor import Blocks, Compressor, OpenBlocks
from kvshare.layers.grouped_linear import GroupedLinear
from kvshare.layers.latent_expansion import LatentExpansion, joined
from kvshare.layers.linear import RouterLinear
from kvshare.layers.norm import LayerNorm, add_scaled, scaled
from kvshare.layers.rotary import frequencies
from kvshare.layout import CacheLayout, LayerCache, State, Stream
from kvshare.models.zaya import Attention, ResidualScale, Windows
from kvshare.models.zaya_config import ZayaConfig

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

M = TypeVar("M", bound=nn.Module)
SHAPES = [(1, 64), (3, 330)]  # tokens and width
ROPE = frequencies({"rope_theta": 1e4}, 8)


def zaya_config(**changes: object) -> ZayaConfig:
    small = {"vocab_size": 8, "num_hidden_layers": 1, "moe_intermediate_size": 8, "num_experts": 2, "router_hidden_size": 8}
    heads = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return ZayaConfig.read({"model_type": "zaya", "max_position_embeddings": 512, **small, **heads, **changes})


def filled(module: M, dtype: torch.dtype) -> M:
    for seed, parameter in enumerate(module.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))
    return module.to(dtype)


class Stepped:
    """The same tokens through a layer with states, as kernels step it and as plain torch does: one a step, sequences begun one by one."""

    def __init__(self, states: tuple[State, ...], num_sequences: int = 3):
        odd = State("odd", (1001,), "bf16")  # the states behind it begin anywhere in a page
        layer = LayerCache("full", 0, (Stream("k", 1, 8), Stream("v", 1, 8)), (odd, *states))
        self.layout = CacheLayout((layer,))
        self.cache = PagedCache(self.layout, "fp32")
        pages = self.layout.peak_pages(64, num_sequences, "fp32", chunk=64)
        self.arenas = [Arena(pages, self.layout.page_bytes("fp32")) for _ in range(2)]
        self.caches = [[SequenceCache(self.layout, arena, "fp32") for _ in range(num_sequences)] for arena in self.arenas]

    def run(
        self,
        steps: int,
        native: Callable[[PagedStep], list[Tensor]],
        twin: Callable[[PagedStep], list[Tensor]],
        check: Callable[[Tensor, Tensor], None],
    ) -> None:
        for step in range(steps):
            both = []
            for caches, compute in zip(self.caches, (native, twin), strict=True):
                running = caches[: 1 + min(step // 3, len(caches) - 1)]
                for cache in running:
                    cache.reserve(1)
                both.append(compute(PagedStep(self.cache, running, [1] * len(running))))
                for cache in running:
                    cache.commit(1)
            for got, wanted in zip(*both, strict=True):
                check(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (16, False)])
@torch.no_grad()
def test_compressor(ratio: int, overlap: bool, dtype: torch.dtype, isa: str) -> None:
    """Entries and what is cached of open blocks, over many blocks, with states that pages cut."""
    width, rows = 80, ratio * (1 + overlap)
    projected = width * (1 + overlap)
    stepped = Stepped((State("open_kv", (rows, projected), "fp32"), State("open_gate", (rows, projected), "fp32")))
    compressor = Compressor(width, ratio, overlap, 1e-6, 0, "open")
    filled(compressor, torch.float32).norm.to(dtype)
    seeds = [0, 0]

    def inputs(way: int, step: PagedStep) -> tuple[Tensor, Tensor]:
        seeds[way] += 1
        both = random(len(step.positions), 2 * projected, dtype=dtype, seed=1000 * seeds[way])
        return both[:, :projected], both[:, projected:]  # not in one piece, as behind a product

    def native(step: PagedStep) -> list[Tensor]:
        entries = compressor(*inputs(0, step), OpenBlocks.of(step, ratio, ROPE), step)
        complete = (step.positions + 1) % ratio == 0
        assert not entries[~complete].any()
        return [entries[complete], *open_rows(step)]

    def twin(step: PagedStep) -> list[Tensor]:
        return [compressor(*inputs(1, step), Blocks.of(step, ratio, overlap, ROPE), step), *open_rows(step)]

    def open_rows(step: PagedStep) -> list[Tensor]:
        """What later entries will pool: the block before, where there is one, and the open one."""
        lead, found = ratio if overlap else 0, []
        for name in ("open_kv", "open_gate"):
            for sequence, state in enumerate(step.state(0, name)):
                length = int(step.positions[sequence]) + 1
                found += [state[lead : lead + length % ratio], state[:lead] if length >= ratio else state[:0]]
        return found

    stepped.run(3 * ratio + 5, native, twin, lambda got, wanted: assert_equal(got, wanted, 8.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("taps", "biased"), [((2, 2), False), ((4, 3), True)])
@torch.no_grad()
def test_convolved_heads(taps: tuple[int, int], biased: bool, dtype: torch.dtype, isa: str) -> None:
    config = zaya_config(cca_time0=taps[0], cca_time1=taps[1], attention_bias=biased)
    attention = filled(Attention(config, 0), dtype)
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    stepped = Stepped((State("conv", (6 * 16, sum(taps) - 2), name), State("delayed_value", (16,), name)))
    seeds = [0, 0]

    def projected(way: int, step: PagedStep) -> Tensor:
        seeds[way] += 1
        return random(len(step.positions), sum(attention.sizes), dtype=dtype, seed=1000 * seeds[way])

    def native(step: PagedStep) -> list[Tensor]:
        return [*attention._stepped(projected(0, step), step), *states(step)]

    def twin(step: PagedStep) -> list[Tensor]:
        windows = Windows(*(CausalWindows.of(step.counts, back) for back in (sum(taps) - 2, 1)))
        return [*attention._mixed(projected(1, step), windows, step), *states(step)]

    def states(step: PagedStep) -> list[Tensor]:
        return [step.state(0, "conv"), step.state(0, "delayed_value")]

    def check(got: Tensor, wanted: Tensor) -> None:
        """Rounding borders on the way, of the convolution and of the length, are a unit each."""
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        bound = 8.0 * (2.0**-7 if dtype == torch.bfloat16 else 2.0**-18)
        assert (got.double() - wanted.double()).abs().max() <= bound

    stepped.run(12, native, twin, check)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "groups", "inputs", "outputs"), [(1, 2, 64, 12), (3, 5, 96, 130), (2, 2, 1024, 600)])
@torch.no_grad()
def test_products_by_groups(
    rows: int, groups: int, inputs: int, outputs: int, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, latent = filled(GroupedLinear(groups, inputs, outputs), dtype), filled(LatentExpansion(groups, inputs, outputs, 40), dtype)
    wide = random(rows, groups, inputs + 7, dtype=dtype)
    x, summed = wide[..., :inputs], random(rows, groups, 40, dtype=dtype)
    assert group_products.takes(x)
    found = linear(x), latent.absorbed(x), latent.values(summed)
    monkeypatch.setattr(group_products, "takes", lambda x: False)
    for got, wanted in zip(found, (linear(x), latent.absorbed(x), latent.values(summed)), strict=True):
        size = 4 * inputs**0.5
        assert (got.double() - wanted.double()).abs().max() <= size * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-18)
        assert got.shape == wanted.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_channels(tokens: int, width: int, dtype: torch.dtype, isa: str, both: Both) -> None:
    x, y = random(tokens, width, dtype=dtype), random(tokens, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype)
    assert_equal(*both(lambda x: scaled(x, weight, 0.3), x))
    assert_equal(*both(lambda x: add_scaled(x, y, weight), x), 40.0)
    assert_equal(*both(gelu, x), 1.0)
    norm = filled(LayerNorm(width, 1e-6), dtype)
    assert_equal(*both(lambda x: norm(x[:, :width]), torch.cat([x, y], dim=1)), 4.0)
    assert_equal(*both(lambda x: joined(x[:, None], y[:, None, : width // 2]), x))


@torch.no_grad()
def test_a_router_sees_products_that_are_not_rounded(isa: str) -> None:
    linear, x = filled(RouterLinear(64, 33), torch.bfloat16), random(2, 64, dtype=torch.bfloat16)
    assert_equal(linear.precise(x), nn.functional.linear(x.float(), linear.weight.float()), 64.0)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_scaled_residual(dtype: torch.dtype, isa: str, both: Both) -> None:
    scale = filled(ResidualScale(zaya_config(hidden_size=330)), torch.float32)
    x, residual = random(3, 330, dtype=dtype), random(3, 330, dtype=torch.float32, seed=1)
    for part in (0, 1):
        assert_equal(*both(lambda x, part=part: scale(x, residual)[part], x), 20.0)

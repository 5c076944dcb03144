"""Routers and the experts that they choose equal their twins in plain torch, in every instruction set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity.test_deepseek_v4
import parity.test_gemma4
import parity.test_laguna
import parity.test_zaya
import pytest
import torch
from kernels.twins import Both, assert_equal, random
from parity.harness import load
from torch import Tensor, nn

from kvshare import kernels
from kvshare.checkpoints.block_encoding import block_type, encode_blocks
from kvshare.kernels import routing
from kvshare.kernels.experts import MOST_ROWS
from kvshare.kernels.quantized_weight import ActivationWidth
from kvshare.layers.activations import GatedActivation, geglu, swiglu
from kvshare.layers.experts import Experts
from kvshare.layers.quantized_experts import QuantizedExperts

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.reason_unavailable()}")

EXPERTS, HIDDEN, WIDTH = 6, 96, 40


def experts_of(activation: GatedActivation) -> Experts:
    layer = Experts(EXPERTS, HIDDEN, WIDTH, activation).to(torch.bfloat16)
    for seed, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
    return layer


def choices(tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """Different experts for each token, the last token's first choice being none at all."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])
    chosen[-1, 0] = EXPERTS
    return chosen, torch.rand(tokens, k, generator=generator)


@pytest.mark.parametrize("activation", [swiglu, geglu, GatedActivation(limit=0.5)])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_experts_equal_their_twin(tokens: int, activation: GatedActivation, isa: str, both: Both) -> None:
    layer, x, beside = (
        experts_of(activation),
        random(tokens, HIDDEN, dtype=torch.bfloat16),
        random(tokens, HIDDEN, dtype=torch.bfloat16, seed=1),
    )
    chosen, weights = choices(tokens, 4)

    def run(x: Tensor, weights: Tensor, **options: Any) -> Tensor:
        return layer(x, chosen, weights, **options)

    for given in (weights, weights.bfloat16()):
        assert_equal(*both(run, x, given), 4.0)
        assert_equal(*both(lambda x, given=given: run(x, given, scale=2.5, beside=beside), x), 10.0)


def test_a_tokens_experts_do_not_depend_on_its_neighbours(isa: str) -> None:
    layer, x = experts_of(swiglu), random(8, HIDDEN, dtype=torch.bfloat16)
    chosen, weights = choices(8, 3)
    with torch.no_grad():
        together = layer(x, chosen, weights)
        for row in range(8):
            one = slice(row, row + 1)
            assert torch.equal(together[one], layer(x[one], chosen[one], weights[one]))


def test_a_token_may_name_an_expert_more_than_once(isa: str, both: Both) -> None:
    """As a faulty table of choices does; no buffer is then too small."""
    layer, x = experts_of(swiglu), random(16, HIDDEN, dtype=torch.bfloat16)
    _, weights = choices(16, 4)
    assert_equal(*both(lambda x: layer(x, torch.full((16, 4), 2), weights), x), 4.0)


def test_an_expert_that_is_not_there_is_refused() -> None:
    layer, x = experts_of(swiglu), random(1, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(IndexError, match="expert 7 of 6"):
        layer(x, torch.tensor([[7]]), torch.ones(1, 1))


def in_blocks(
    precision: str, activation: GatedActivation = swiglu, activations: ActivationWidth = "int16"
) -> tuple[QuantizedExperts, Experts]:
    """Experts in blocks, and with the same weights decoded, in float32."""
    layer = Experts(EXPERTS, HIDDEN, 64, activation)
    parts = []
    with torch.no_grad():
        for seed, parameter in enumerate((layer.gate_up, layer.down)):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
            packed = encode_blocks(parameter, block_type(precision, parameter.shape[-1]))
            parameter.copy_(packed.dequantize())
            parts.append(packed)
    gate_up, down = parts  # one part for all experts, and one for each
    return QuantizedExperts(
        EXPERTS, [gate_up.as_matrix()], [down.part(expert) for expert in range(EXPERTS)], activation, activations
    ), layer


@pytest.mark.parametrize("activation", [swiglu, geglu])
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(("precision", "activations"), [("int8", "int16"), ("int4", "int16"), ("int4", "int8")])
def test_experts_in_blocks_equal_their_twin(
    precision: str, activations: ActivationWidth, tokens: int, activation: GatedActivation, isa: str, both: Both
) -> None:
    layer, _ = in_blocks(precision, activation, activations)
    x, beside = (random(tokens, HIDDEN, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    chosen, weights = choices(tokens, 4)
    assert_equal(*both(lambda x: layer(x, chosen, weights, scale=2.5, beside=beside), x), 10.0)


@pytest.mark.parametrize("tokens", [1, 16, MOST_ROWS, MOST_ROWS + 1, 200])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_experts_in_blocks_are_those_of_their_decoded_weights(precision: str, tokens: int, isa: str) -> None:
    blocks, decoded = in_blocks(precision)
    x, (chosen, weights) = random(tokens, HIDDEN, dtype=torch.float32), choices(tokens, 3)
    with torch.no_grad():
        found, expected = blocks(x, chosen, weights), decoded(x, chosen, weights)
    assert (found - expected).square().mean() < 1e-8 * expected.square().mean()


def test_a_token_in_blocks_does_not_depend_on_its_neighbours(isa: str) -> None:
    layer, _ = in_blocks("int4")
    x, (chosen, weights) = random(9, HIDDEN, dtype=torch.bfloat16), choices(9, 3)
    with torch.no_grad():
        together = layer(x, chosen, weights)
        for row in range(9):
            one = slice(row, row + 1)
            assert torch.equal(together[one], layer(x[one], chosen[one], weights[one]))


def oracle(family: str) -> Any:
    if family == "laguna":
        return parity.test_laguna.oracle_of()
    return parity.test_deepseek_v4.build() if family == "deepseek v4" else parity.test_zaya.oracle_of()


def routers_of(family: str, directory: Path) -> list[nn.Module]:
    if family == "gemma 4":
        parity.test_gemma4.tiny_gemma4("26B-A4B", directory)
    else:
        oracle(family).save_pretrained(directory)
    return [module for module in load(directory, torch.bfloat16).modules() if type(module).__name__ == "Router"]


@pytest.mark.parametrize("family", ["gemma 4", "laguna", "deepseek v4", "zaya"])
def test_routers_equal_their_twins(family: str, tmp_path: Path, both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    natively: list[int] = []
    plain = routing.route
    monkeypatch.setattr(routing, "route", lambda *args, **options: natively.append(1) or plain(*args, **options))
    routers = routers_of(family, tmp_path)
    for router in routers:
        hidden = (router.down if family == "zaya" else router.scores).weight.shape[1]
        x = random(5, hidden, dtype=torch.bfloat16)
        others = {"deepseek v4": (torch.tensor([3, 4, 5, 6, 7]),), "zaya": (None,)}.get(family, ())
        for part in (0, 1):
            native, twin = both(lambda x, router=router, others=others, part=part: router(x, *others)[part], x)
            if part == 0:
                assert torch.equal(native, twin)
            else:
                assert_equal(native, twin, 2.0**-3)
    assert len(natively) == 2 * len(routers) > 0


@pytest.mark.parametrize("bf16", [True, False])
def test_every_way_of_choosing(bf16: bool, isa: str) -> None:
    scores = random(9, 24, dtype=torch.bfloat16 if bf16 else torch.float32)
    bias, gains = random(24, dtype=torch.float32), random(24, dtype=torch.bfloat16)
    logits = scores.float()
    capped = (3 * torch.tanh(logits / 3)).sigmoid()
    with torch.no_grad():
        chosen, weights = routing.route(scores, 5, "sigmoid", torch.float32, softcap=3.0, bias=bias, tiny=1e-20, scale=1.5)
        assert torch.equal(chosen, (capped + bias).topk(5).indices)
        picked = capped.gather(1, chosen)
        torch.testing.assert_close(weights, picked / picked.sum(-1, keepdim=True) * 1.5, rtol=2e-6, atol=0)

        chosen, weights = routing.route(scores, 4, "softmax", torch.float32, expert_scale=gains)
        best, expected = logits.softmax(-1).topk(4)
        assert (logits.gather(1, chosen) == logits.gather(1, expected)).all()  # bfloat16 scores may be equal: then the earlier expert
        torch.testing.assert_close(weights, best / best.sum(-1, keepdim=True) * gains.float()[chosen], rtol=2e-6, atol=0)

        chosen, _ = routing.route(scores, 4, "sigmoid", torch.float32, bias=bias, groups=(6, 2))
        choice = (logits.sigmoid() + bias).unflatten(1, (6, 4))
        kept = choice.topk(2).values.sum(-1).topk(2).indices
        hidden = torch.ones(9, 6, dtype=torch.bool).scatter_(1, kept, False)
        assert torch.equal(chosen, choice.masked_fill(hidden[..., None], -torch.inf).flatten(1).topk(4).indices)

        table, ids = torch.randint(24, (30, 3)), torch.arange(9) * 3
        chosen, weights = routing.route(scores, 3, "sqrt_softplus", torch.float32, lookup=(table, ids), tiny=None, scale=0.5)
        assert torch.equal(chosen, table[ids])
        torch.testing.assert_close(weights, nn.functional.softplus(logits).sqrt().gather(1, chosen) * 0.5, rtol=2e-6, atol=0)
        with pytest.raises(ValueError, match="cannot be chosen"):
            routing.route(scores, 9, "sigmoid", torch.float32, groups=(6, 2))

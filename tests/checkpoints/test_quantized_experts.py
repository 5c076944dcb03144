"""Experts in quantized blocks say what their decoded weights say, in every family that routes; routers are never quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity.test_deepseek_v3
import parity.test_deepseek_v4
import parity.test_gemma4
import parity.test_laguna
import parity.test_zaya
import pytest
import torch
from checkpoints.gguf_writing import TYPES, quantized, random_model, write_gguf
from parity.harness import WAYS, chunked, one_shot, random_ids
from torch import Tensor

from kvshare import kernels
from kvshare.checkpoints import open_checkpoint, resident
from kvshare.checkpoints.quantized_weights import plain_matrices, quantize
from kvshare.checkpoints.resident import ResidentMemory
from kvshare.checkpoints.weights import load_weights
from kvshare.kernels.interleaved_blocks import InterleavedBlocks
from kvshare.layers.experts import Experts
from kvshare.layers.linear import RouterLinear
from kvshare.layers.quantized_experts import QuantizedExperts
from kvshare.models import build_model
from kvshare.models.model import Model

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.reason_unavailable()}")

FAMILIES = ("gemma 4", "laguna", "zaya", "deepseek v3", "deepseek v3.2", "deepseek v4")
WHOLE_GROUPS = {"hidden_size": 64, "moe_intermediate_size": 32}


def oracle(family: str) -> Any:
    match family:
        case "laguna":
            return parity.test_laguna.oracle_of(**WHOLE_GROUPS)
        case "zaya":
            return parity.test_zaya.oracle_of(**WHOLE_GROUPS, router_hidden_size=32)
        case "deepseek v4":
            return parity.test_deepseek_v4.build(**WHOLE_GROUPS)
        case _:
            return parity.test_deepseek_v3.build(family.removeprefix("deepseek "), **WHOLE_GROUPS)


@pytest.fixture(params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model of a family, whose experts have rows of whole groups."""
    if request.param == "gemma 4":
        parity.test_gemma4.tiny_gemma4("26B-A4B", tmp_path, moe_intermediate_size=32)
    else:
        oracle(request.param).save_pretrained(tmp_path)
    return tmp_path


def load(
    path: Path,
    weights: str = "plain",
    decoded: bool = False,
    dtype: torch.dtype = torch.float32,
    memory: ResidentMemory | None = None,
) -> Model:
    """With `weights` "plain", as the file is; else quantized, and multiplied as blocks unless these are `decoded`."""
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config, dtype)
    if weights != "plain":
        checkpoint = quantize(model, checkpoint, weights, cached=False)
    load_weights(model, checkpoint, dtype, keep_blocks=weights != "plain" and not decoded, resident=memory)
    return model.eval()


def ids_of(path: Path) -> Tensor:  # [2, 41]
    return random_ids(open_checkpoint(path).config["vocab_size"])


def relative(found: Tensor, expected: Tensor, share: float = 0.9) -> float:  # [..., numbers] each
    """The error that this share of the tokens stays below: where two choices nearly tie, rounding decides, and the text behind it too."""
    errors = (found - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    return float(errors.flatten().quantile(share))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_blocks_say_what_their_decoded_weights_say(precision: str, saved: Path) -> None:
    blocks, wide, ids = load(saved, precision), load(saved, precision, decoded=True), ids_of(saved)
    expected = one_shot(wide, ids)
    for way in ("one shot", "stepwise", "ragged"):
        assert relative(WAYS[way](blocks, ids), expected) < 2e-3, way


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.01), ("int4", 0.15)])
def test_blocks_are_the_weights_that_were_quantized(precision: str, bound: float, saved: Path) -> None:
    """Each expert's own, its gates before its ups: another row is 1.4 away."""
    plain = load(saved)
    for path, blocks in load(saved, precision).named_modules():
        if isinstance(blocks, QuantizedExperts):
            experts = plain.get_submodule(path)
            assert isinstance(experts, Experts)
            for weight, rows in ((blocks.gate_up, experts.gate_up.flatten(0, 1)), (blocks.down, experts.down.flatten(0, 1))):
                assert 0 < relative(weight.decode(0, len(rows), torch.float32), rows, share=0.99) < bound


def test_four_bits_run_in_bfloat16(saved: Path) -> None:
    """Prefill, then tokens one by one, whose replayed steps the harness holds to the steps themselves."""
    model, ids = load(saved, "int4", dtype=torch.bfloat16), ids_of(saved)
    found = chunked(model, ids, [33, *[1] * 8], dtype=torch.bfloat16).float()
    expected = one_shot(load(saved, "int4", decoded=True), ids)
    assert relative(found, expected, share=0.5) < 0.5  # other texts' logits are at 1.4; these random models make much of 16-bit rounding


def test_experts_are_quantized_and_routers_are_not(saved: Path) -> None:
    blocks, plain = load(saved, "int4"), load(saved)
    kinds = [type(module) for module in blocks.modules()]
    assert kinds.count(QuantizedExperts) == [type(module) for module in plain.modules()].count(Experts) > 0
    assert Experts not in kinds
    routers = {path: module for path, module in plain.named_modules() if isinstance(module, RouterLinear)}
    assert routers
    for path, router in routers.items():
        kept = blocks.get_submodule(path)
        assert isinstance(kept, RouterLinear)
        assert torch.equal(kept.weight, router.weight)


def test_experts_one_by_one_and_stacked_give_the_same_blocks(tmp_path: Path) -> None:
    model = oracle("laguna")
    model.save_pretrained(tmp_path / "released")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    released, stacked = (load(tmp_path / name, "int4") for name in ("released", "stacked"))
    for path, experts in released.named_modules():
        if isinstance(experts, QuantizedExperts):
            other = stacked.get_submodule(path)
            assert isinstance(other, QuantizedExperts)
            assert (len(experts.gate_up.parts), len(other.gate_up.parts)) == (2 * experts.num_experts, 1)
            for mine, theirs in ((experts.gate_up, other.gate_up), (experts.down, other.down)):
                whole = mine.decode(0, mine.out_features, torch.float32)
                assert torch.equal(whole, theirs.decode(0, theirs.out_features, torch.float32))
    ids = ids_of(tmp_path / "released")
    assert torch.equal(one_shot(released, ids), one_shot(stacked, ids))


def test_experts_are_copied_to_resident_memory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "LEAST_BYTES", 1)
    ids, mapped = ids_of(saved), load(saved, "int4")
    held = load(saved, "int4", memory=ResidentMemory(left_free=0.0))
    experts = [module for module in held.modules() if isinstance(module, QuantizedExperts)]
    assert all(isinstance(part, InterleavedBlocks) for each in experts for part in (*each.gate_up.parts, *each.down.parts))
    for way in ("one shot", "stepwise"):
        assert torch.equal(WAYS[way](held, ids), WAYS[way](mapped, ids))


def test_experts_are_quantized_once_and_mapped_from_the_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path / "cache"))
    checkpoint = open_checkpoint(saved)
    model = build_model(checkpoint.config, torch.float32)
    names = [name for name in plain_matrices(model, checkpoint) if ".experts." in name]
    first = quantize(model, checkpoint, "int4")
    second = quantize(model, checkpoint, "int4", progress=lambda *_: pytest.fail("quantized again"))
    in_memory = quantize(model, checkpoint, "int4", cached=False)
    assert names
    for name in names:
        kept = [packed for each in (first, second, in_memory) if (packed := each.packed(name))]
        assert [packed.shape for packed in kept] == [checkpoint.shape(name)] * 3
        assert all(torch.equal(kept[0].blocks, packed.blocks) for packed in kept[1:])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_experts_of_a_gguf_file_stay_in_its_blocks(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("gemma4_text, experts"), quantized(TYPES[kind]))
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config, torch.float32)
    load_weights(model, checkpoint, torch.float32, keep_blocks=True)
    ids = random_ids(96, seed=2)
    expected = one_shot(load(path), ids)
    for way in ("one shot", "stepwise"):
        assert relative(WAYS[way](model, ids), expected) < 2e-3, way
    assert sum(isinstance(module, QuantizedExperts) for module in model.modules()) == 4
    assert all(isinstance(block.feed_forward.router.scores, RouterLinear) for block in model.blocks)  # though the file has blocks for it


def test_experts_with_broken_groups_stay_plain(tmp_path: Path) -> None:
    """Rows of 24 numbers: nothing of these experts is quantized, not even the other half of their matrices."""
    parity.test_laguna.oracle_of(hidden_size=64).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert not [name for name in plain_matrices(build_model(checkpoint.config, torch.float32), checkpoint) if ".experts." in name]
    assert any(isinstance(module, Experts) for module in load(tmp_path, "int4").modules())

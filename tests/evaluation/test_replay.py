"""Blocks in front of the first owner that differs are not run again, and nobody can tell."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from kvshare import LLM
from kvshare.cache.step import Step
from kvshare.evaluation.divergence import Comparison, cached_hidden
from kvshare.evaluation.replay import BlockOutputs
from kvshare.layers.rotary import Rotation
from kvshare.models.model import Model

IDS = list(range(3, 60))


def check_every_owner(model: Model) -> None:
    outputs, layout = BlockOutputs(model), model.layout
    with torch.inference_mode():
        with outputs.recorded():
            cached_hidden(model, IDS, "bf16")
        assert outputs.count >= layout.owners[-1]
        for owner in layout.owners:
            candidate = {-1: "bf16", owner: "rot3"}
            whole = cached_hidden(model, IDS, candidate)
            with outputs.replayed(owner):
                assert torch.equal(cached_hidden(model, IDS, candidate), whole), owner
            with outputs.replayed(owner):
                spared = sum("forward" in vars(block) for block in model.blocks.children())
            read = [each for each in layout.owners if each < owner and any(reader >= owner for reader in layout.readers(each))]
            assert spared == owner - len(read)
        assert not any("forward" in vars(block) for block in model.blocks.children())


def test_it_is_what_would_be_computed_in_a_model_with_readers() -> None:
    check_every_owner(tiny.model())


def test_and_with_inputs_of_each_layer() -> None:
    """The model in the package: Gemma 4's structure."""
    check_every_owner(LLM("demo", dtype="float32", max_context=64, progress=False).model)


def test_blocks_that_hand_on_something_else_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, candidates = tiny.model(), [{-1: "bf16", 2: "int4"}]
    expected = Comparison(model, [IDS], "bf16").of(candidates)
    block = type(model.blocks[0])
    forward = block.forward

    def changed(self: nn.Module, x: Tensor, rotation: Rotation, step: Step) -> tuple[Tensor, Rotation, Step]:
        x, rotation, step = forward(self, x, rotation, step)
        return x, Rotation(rotation.cos.clone(), rotation.sin.clone()), step

    monkeypatch.setattr(block, "forward", changed)
    outputs = BlockOutputs(model)
    with torch.inference_mode(), outputs.recorded():
        cached_hidden(model, IDS, "bf16")
    assert outputs.count == 0
    assert Comparison(model, [IDS], "bf16").of(candidates) == expected

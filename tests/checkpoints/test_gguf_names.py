"""Every tensor that the `gguf` package lists for an architecture has a Hugging Face name here, and the package agrees on it."""

from __future__ import annotations

import gguf
import pytest

from kvshare.checkpoints.gguf_names import NAMINGS

NOT_OURS = {
    "llama": {"blk.{bid}.attn_rot_embd", "blk.{bid}.ffn_gate_inp"} | {f"blk.{{bid}}.ffn_{part}_exps" for part in ("gate", "up", "down")},
}
"""Tensors of models that are refused by their config: experts under `llama`, rotation tables of the first GGUF files."""


@pytest.mark.parametrize("architecture", NAMINGS)
def test_all_names_of_the_architecture_are_known(architecture: str):
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    theirs = [gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]]
    theirs = {name for name in theirs if name not in NOT_OURS.get(architecture, ())}
    shapes = {name.format(bid=3) + ".weight": (3, 4, 4) for name in theirs}
    places, skipped = NAMINGS[architecture].places(shapes)
    assert skipped == ()

    back = gguf.get_tensor_name_map(arch, 4)
    for ours, place in places.items():
        if place.part is not None:
            ours = ours.replace(f".{place.part}.", ".")
        assert back.get_name(ours, try_suffixes=(".weight", ".bias")) in (place.name, place.name.removesuffix(".weight")), ours


def test_a_tensor_of_another_model_is_skipped_and_reported():
    places, skipped = NAMINGS["qwen3"].places({"blk.0.attn_q.weight": (4, 4), "v.patch_embd.weight": (4, 4), "blk.0.ssm_a": (4,)})
    assert list(places) == ["model.layers.0.self_attn.q_proj.weight"]
    assert skipped == ("blk.0.ssm_a", "v.patch_embd.weight")

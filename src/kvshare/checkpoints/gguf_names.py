"""Names of tensors in GGUF files and in Hugging Face's text models, and what the conversion to GGUF did to their numbers.

The GGUF names are those of the `gguf` package's tables. Three conversions changed numbers: rotated q and k rows of `llama`
stand in another order, norms of `gemma3` are stored with the 1 added that the model adds, and the projections of `gemma3n`'s
streams are stacked in one tensor. `gemma3n` and `gemma4` multiply by their norms as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = {**_BLOCK, "ffn_norm": "post_attention_layernorm"}
_GEMMA = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PER_LAYER = {"inp_gate": "per_layer_input_gate", "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm"}
_PER_LAYER_WHOLE = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_GEMMA3N = {
    **_GEMMA,
    **_PER_LAYER,
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
_GEMMA4 = {
    **_GEMMA,
    **_PER_LAYER,
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
}

_EXACT_GEMMA3N = {"altup_correct_scale.weight": "altup.correct_output_scale"}
_EXACT_GEMMA4 = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
}


class Change(Enum):
    """What the conversion did, to be undone when the tensor is read."""

    NONE = 0
    ROTARY_ORDER = 1  # rows of each head were interleaved: pairs that rotate together stand together
    NORM_PLUS_ONE = 2  # 1 was added


@dataclass(frozen=True, slots=True)
class Place:
    """Where a Hugging Face tensor is in the file."""

    name: str
    change: Change = Change.NONE
    part: int | None = None  # its index along the first dimension of a stack


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of one architecture; those of the blocks stand behind `blk.N.` and `model.layers.N.`."""

    whole: Mapping[str, str]
    block: Mapping[str, str]
    exact: Mapping[str, str]  # block tensors whose suffix (`.weight`) differs too
    stacks: Mapping[str, str]  # one tensor that is several in Hugging Face's files
    ignored: frozenset[str] = frozenset()  # what the config already says
    rotary_order: bool = False
    norm_plus_one: bool = False

    def places(self, tensors: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Place], tuple[str, ...]]:
        """Hugging Face names mapped to places, for a file's tensors and their shapes, and the tensors that are no part of the model."""
        found: dict[str, Place] = {}
        skipped = []
        for name, shape in tensors.items():
            places = list(self._places(name, shape))
            found.update(places)
            if not places and name not in self.ignored:
                skipped.append(name)
        return found, tuple(sorted(skipped))

    def _places(self, name: str, shape: tuple[int, ...]) -> Iterable[tuple[str, Place]]:
        stem, _, suffix = name.rpartition(".")
        if stem in self.stacks:
            for part in range(shape[0]):
                yield f"{self.stacks[stem]}.{part}.{suffix}", Place(name, part=part)
        elif stem in self.whole:
            yield f"{self.whole[stem]}.{suffix}", Place(name, self._change(stem))
        elif match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
            layer, short = f"model.layers.{int(match[1])}", match[2]
            if short in self.exact:
                yield f"{layer}.{self.exact[short]}", Place(name)
            elif (stem := short.rpartition(".")[0]) in self.block:
                yield f"{layer}.{self.block[stem]}.{suffix}", Place(name, self._change(stem))

    def _change(self, stem: str) -> Change:
        if self.rotary_order and stem in ("attn_q", "attn_k"):
            return Change.ROTARY_ORDER
        return Change.NORM_PLUS_ONE if self.norm_plus_one and stem.endswith("norm") else Change.NONE


_ROPE = frozenset({"rope_freqs.weight"})

NAMINGS: Mapping[str, Naming] = {
    "llama": Naming(_WHOLE, _LLAMA, {}, {}, _ROPE, rotary_order=True),
    "qwen2": Naming(_WHOLE, _LLAMA, {}, {}, _ROPE),
    "qwen3": Naming(_WHOLE, _LLAMA, {}, {}, _ROPE),
    "gemma3": Naming(_WHOLE, _GEMMA, {}, {}, norm_plus_one=True),
    "gemma3n": Naming(
        {**_WHOLE, **_PER_LAYER_WHOLE},
        _GEMMA3N,
        _EXACT_GEMMA3N,
        {"altup_proj": "model.altup_projections", "altup_unembd_proj": "model.altup_unembed_projections"},
    ),
    "gemma4": Naming({**_WHOLE, **_PER_LAYER_WHOLE}, _GEMMA4, _EXACT_GEMMA4, {}, _ROPE),
}
"""The architectures that load, by `general.architecture`."""

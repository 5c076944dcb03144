"""What a ZAYA1 config says, in either of its schemas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvshare.errors import ConfigError
from kvshare.layout.config import Fields
from kvshare.layout.rules.zaya import is_legacy

FULL, SLIDING = "hybrid", "hybrid_sliding"


@dataclass(frozen=True, slots=True)
class ZayaConfig:
    legacy: bool  # the schema in which attention and experts are layers of their own
    num_layers: int  # of attention with experts behind it
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    conv_taps: tuple[int, int]  # of the depthwise and of the grouped stage
    bias: bool  # of all projections of attention
    rope: Mapping[str, Mapping[str, Any]]  # of full and of sliding layers
    num_experts: int
    expert_width: int
    router_width: int
    eps: float
    tied: bool
    head_bias: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> ZayaConfig:
        fields = Fields(config)
        legacy = is_legacy(fields)
        for name, only in (_LEGACY_ONLY if legacy else _NATIVE_ONLY).items():
            if fields.get(name, only) != only:
                raise ConfigError(name, f"{fields.get(name)!r}: this family is known with {only!r} only")
        return ZayaConfig(
            legacy,
            fields.integer("num_hidden_layers") // (2 if legacy else 1),
            fields.integer("hidden_size"),
            fields.integer("vocab_size"),
            fields.integer("num_attention_heads"),
            fields.integer("num_key_value_heads"),
            fields.integer("head_dim"),
            (fields.integer("cca_time0", 2), fields.integer("cca_time1", 2)),
            bool(fields.get("attention_bias", False)),
            _legacy_rope(fields) if legacy else _rope(fields),
            fields.integer("num_experts"),
            fields.integer("ffn_hidden_size") // 2 if legacy else fields.integer("moe_intermediate_size", 2048),
            fields.integer("zaya_mlp_expansion") if legacy else fields.integer("router_hidden_size", 256),
            float(fields.get("norm_epsilon" if legacy else "rms_norm_eps", 1e-5)),
            bool(fields.get("tie_word_embeddings", True)),
            bool(fields.get("lm_head_bias", False)),
        )


_NATIVE_ONLY = {"num_experts_per_tok": 1, "hidden_act": "silu"}
_LEGACY_ONLY = {
    "moe_router_topk": 1,
    "activation_func": "swiglu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "scale_residual_merge": True,
    "residual_in_fp32": True,
    "zaya_use_eda": True,
    "zaya_use_mod": True,
    "clamp_temp": False,
}


def _rope(fields: Fields) -> dict[str, Mapping[str, Any]]:
    given = fields.mapping("rope_parameters")  # released files hold a stray "rope_type" beside the two entries
    default = {FULL: 5e6, SLIDING: 1e4}
    return {kind: {"rope_theta": theta, "partial_rotary_factor": 0.5, **given.get(kind, {})} for kind, theta in default.items()}


def _legacy_rope(fields: Fields) -> dict[str, Mapping[str, Any]]:
    if fields.get("rope_scaling"):
        raise ConfigError("rope_scaling", f"{fields.get('rope_scaling')!r}: no legacy checkpoint is known to scale its rotation")
    share = fields.get("partial_rotary_factor", 0.5)
    thetas = {FULL: fields.get("rope_theta", 5e6), SLIDING: fields.get("swa_rotary_base", 1e4)}
    return {kind: {"rope_theta": theta, "partial_rotary_factor": share} for kind, theta in thetas.items()}

"""The config that a GGUF file's metadata stands for, in the shape of a Hugging Face `config.json`. No torch, no numpy."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvshare.checkpoints.gguf_header import GGUFHeader, read_header
from kvshare.errors import ConfigError
from kvshare.layout.config import Fields

_SLIDING, _FULL = "sliding_attention", "full_attention"


def config_from_gguf(path: str | Path) -> dict[str, Any]:
    """The config of the language model in a GGUF file. Raises `CheckpointError` for a broken file, `ConfigError` for an unknown model."""
    return config_from_header(read_header(path))


def config_from_header(header: GGUFHeader) -> dict[str, Any]:
    """As `config_from_gguf`, of a header that was read already."""
    if header.architecture not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigError("general.architecture", f"{header.architecture!r} does not load from GGUF; known are {known}")
    keys = _Keys(header)
    if keys.integer("expert_count", 0, least=0) and header.architecture != "gemma4":
        raise ConfigError("expert_count", f"a {header.architecture} with a mixture of experts does not load from GGUF")
    return {**_common(keys), **_FAMILIES[header.architecture](keys)}


class _Keys(Fields):
    """The metadata behind the architecture's prefix, and the shapes of tensors, which say what metadata does not."""

    def __init__(self, header: GGUFHeader):
        prefix = f"{header.architecture}."
        super().__init__({name.removeprefix(prefix): value for name, value in header.metadata.items() if name.startswith(prefix)})
        self.header = header
        self.layers = self.integer("block_count")
        if self.layers > len(header.tensors):
            raise ConfigError("block_count", f"is {self.layers}, but the file holds only {len(header.tensors)} tensors")

    def real(self, name: str, default: float | None = None) -> float:
        """A positive number; a missing one is refused unless there is a default."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(name, "missing from the metadata" if value is None else f"must be a positive number, not {value!r}")
        return float(value)

    def reals(self, name: str) -> list[float]:
        """A number for each layer, infinities included."""
        values = self.list_of(name, self.layers, float)
        if values is None:
            raise ConfigError(name, "missing from the metadata")
        return values

    def shape(self, tensor: str) -> tuple[int, ...]:
        info = self.header.tensors.get(tensor)
        if info is None or not info.shape:
            raise ConfigError(tensor, f"missing from {self.header.path}")
        return info.shape

    def holds(self, tensor: str) -> bool:
        return tensor in self.header.tensors

    def layer_types(self, period: int | None = None) -> list[str]:
        """Attention types, from a list of booleans (true slides) or from a period of which the last layer sees everything."""
        name = "attention.sliding_window_pattern"
        if isinstance(self.get(name), list):
            return [_SLIDING if slides else _FULL for slides in self.list_of(name, self.layers, (bool, int)) or []]
        period = self.integer(name, period)
        return [_FULL if (index + 1) % period == 0 else _SLIDING for index in range(self.layers)]

    def same(self, name: str, values: list[int]) -> int:
        """The one value of layers of one kind; 0 where there are none of them."""
        if len(set(values)) > 1:
            raise ConfigError(name, f"differs between layers of one kind: {sorted(set(values))}")
        return values[0] if values else 0


def _common(keys: _Keys) -> dict[str, Any]:
    tokens = {role: keys.header.metadata.get(f"tokenizer.ggml.{word}_token_id") for word, role in _TOKENS.items()}
    return {
        "num_hidden_layers": keys.layers,
        "hidden_size": keys.integer("embedding_length"),
        "num_attention_heads": keys.integer("attention.head_count"),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": _shortest(keys.real("attention.layer_norm_rms_epsilon")),
        "vocab_size": keys.shape("token_embd.weight")[0],
        "tie_word_embeddings": not keys.holds("output.weight"),
        **{f"{role}_token_id": value for role, value in tokens.items() if isinstance(value, int)},
    }


_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}  # the file's words and Hugging Face's


def _llama(keys: _Keys) -> dict[str, Any]:
    architecture, heads = keys.header.architecture, keys.integer("attention.head_count")
    window = keys.optional_integer("attention.sliding_window")
    return {
        "model_type": "mistral" if window and architecture == "llama" else architecture,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": keys.integer("attention.key_length", keys.integer("embedding_length") // heads),
        "intermediate_size": keys.integer("feed_forward_length"),
        "attention_bias": keys.holds("blk.0.attn_q.bias"),
        "rope_parameters": _rope(keys),
        **({"sliding_window": window} if window else {}),
    }


def _gemma3(keys: _Keys) -> dict[str, Any]:
    heads, width = keys.integer("attention.head_count"), keys.integer("attention.key_length", 256)
    # the 27B scales its queries by the width of the model over its heads; the file has no key for it
    scalar = keys.integer("embedding_length") // heads if keys.layers == 62 else width
    return {
        "model_type": "gemma3_text",
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": width,
        "query_pre_attn_scalar": scalar,
        "intermediate_size": keys.integer("feed_forward_length"),
        "layer_types": keys.layer_types(period=6),
        "attn_logit_softcapping": None,
        **_gemma(keys, _rope(keys)),
    }


def _gemma3n(keys: _Keys) -> dict[str, Any]:
    return {
        "model_type": "gemma3n_text",
        "num_key_value_heads": keys.integer("attention.head_count_kv"),
        "head_dim": keys.integer("attention.key_length"),
        "intermediate_size": keys.per_layer("feed_forward_length", keys.layers),
        "activation_sparsity_pattern": [_share_below(each) for each in keys.reals("activation_sparsity_scale")],
        "layer_types": keys.layer_types(),
        "num_kv_shared_layers": keys.integer("attention.shared_kv_layers", least=0),
        "hidden_size_per_layer_input": keys.integer("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": keys.shape("per_layer_token_embd.weight")[0],
        "altup_num_inputs": keys.integer("altup.num_inputs"),
        "altup_active_idx": keys.integer("altup.active_idx", least=0),
        "altup_correct_scale": keys.holds("blk.0.altup_correct_scale.weight"),
        "laurel_rank": keys.shape("blk.0.laurel_l.weight")[0],
        **_gemma(keys, _rope(keys), softcap=30.0),
    }


def _gemma4(keys: _Keys) -> dict[str, Any]:
    types, shared = keys.layer_types(), keys.integer("attention.shared_kv_layers", 0, least=0)
    owners = keys.layers - shared
    kv_heads, widths = (keys.per_layer(name, keys.layers) for name in ("attention.head_count_kv", "feed_forward_length"))
    sliding, full = ([heads for heads, own in zip(kv_heads, types, strict=True) if own == kind] for kind in (_SLIDING, _FULL))
    sliding_heads, full_heads = (keys.same("attention.head_count_kv", heads) for heads in (sliding, full))
    narrow = keys.same("feed_forward_length", widths[:owners])
    wide = keys.same("feed_forward_length", widths[owners:] or [narrow])
    if wide not in (narrow, 2 * narrow):
        raise ConfigError("feed_forward_length", f"is {narrow} in owning layers and {wide} in sharing ones: neither equal nor double")
    full_owners = [index for index in range(owners) if types[index] == _FULL]
    per_layer = keys.integer("embedding_length_per_layer_input", 0, least=0)
    proportional = {
        "rope_type": "proportional",
        "rope_theta": keys.real("rope.freq_base", 1e6),
        "partial_rotary_factor": _moving_share(keys),
    }
    return {
        "model_type": "gemma4_text",
        "num_key_value_heads": sliding_heads or full_heads,
        "num_global_key_value_heads": full_heads if full_heads != sliding_heads else None,
        "head_dim": keys.integer("attention.key_length_swa"),
        "global_head_dim": keys.integer("attention.key_length"),
        "attention_k_eq_v": bool(full_owners) and not any(keys.holds(f"blk.{index}.attn_v.weight") for index in full_owners),
        "intermediate_size": narrow,
        "use_double_wide_mlp": wide != narrow,
        "layer_types": types,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": per_layer,
        **({"vocab_size_per_layer_input": keys.shape("per_layer_token_embd.weight")[0]} if per_layer else {}),
        **_gemma4_experts(keys),
        **_gemma(keys, proportional),
    }


def _gemma4_experts(keys: _Keys) -> dict[str, Any]:
    if not (experts := keys.integer("expert_count", 0, least=0)):
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": experts,
        "top_k_experts": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
    }


def _gemma(keys: _Keys, full_rope: dict[str, Any], softcap: float | None = None) -> dict[str, Any]:
    """What all three Gemmas have."""
    sliding_rope = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10_000.0)}
    return {
        "sliding_window": keys.integer("attention.sliding_window"),
        "final_logit_softcapping": keys.real("final_logit_softcapping", softcap)
        if softcap or keys.has("final_logit_softcapping")
        else None,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {_FULL: full_rope, _SLIDING: sliding_rope},
    }


_FAMILIES: Mapping[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
}

ARCHITECTURES = frozenset(_FAMILIES)
"""The architectures (`general.architecture`) that load from GGUF."""


def _rope(keys: _Keys) -> dict[str, Any]:
    """Rotation of the layers that see everything: frequencies and, for longer contexts, how they are stretched."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base", 10_000.0)}
    kind = keys.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError("rope.scaling.type", f"unknown value {kind!r}: known are none, linear, yarn")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    if keys.holds("rope_freqs.weight"):
        rope |= _llama3(keys, rope["rope_theta"])
    return rope


def _rope_divisors(keys: _Keys) -> list[float]:
    """What each rotated pair's frequency is divided by: the one tensor that is metadata."""
    info = keys.header.tensors["rope_freqs.weight"]
    if info.type.name != "F32":
        raise ConfigError("rope_freqs.weight", f"must be F32, not {info.type.name}")
    with keys.header.path.open("rb") as file:
        file.seek(info.offset)
        divisors = struct.unpack(f"<{info.num_bytes // 4}f", file.read(info.num_bytes))
    if not all(1 <= each < math.inf for each in divisors):
        raise ConfigError("rope_freqs.weight", "holds numbers below 1: frequencies are only ever slowed down")
    return list(divisors)


def _moving_share(keys: _Keys) -> float:
    """Gemma 4 marks the pairs of its full layers that stand still with enormous divisors: the share of those that move."""
    if not keys.holds("rope_freqs.weight"):
        return 1.0
    divisors = _rope_divisors(keys)
    return sum(each < 1e6 for each in divisors) / len(divisors)


def _llama3(keys: _Keys, theta: float) -> dict[str, Any]:
    """Llama 3.1's stretching, whose parameters the file holds only as the divisors that follow from them.

    All its models share the bounds 1 and 4 and the original context; the factor is the largest divisor. Anything else is refused.
    """
    divisors = _rope_divisors(keys)
    factor, low, high, original = max(divisors), 1.0, 4.0, 8192
    for pair, divisor in enumerate(divisors):
        turns = original * theta ** (-pair / len(divisors)) / (2 * math.pi)
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(1 / (blend + (1 - blend) / factor), divisor, rel_tol=1e-4):
            raise ConfigError("rope_freqs.weight", f"pair {pair} is slowed down {divisor} times, which Llama 3.1's rule does not explain")
    bounds = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": _shortest(factor), **bounds}


def _share_below(deviations: float) -> float:
    """The share of a normal distribution below so many standard deviations: Gemma 3n's sparsity, of which the file holds the latter."""
    return round(0.5 * (1 + math.erf(deviations / math.sqrt(2))), 6)


def _shortest(value: float) -> float:
    """The shortest decimal that is this 32-bit float: 1e-06 and not 9.999999974752427e-07."""
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("f", candidate) == struct.pack("f", value):
            return candidate
    return value

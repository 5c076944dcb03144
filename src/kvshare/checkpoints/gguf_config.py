"""The config that a GGUF file's metadata stands for, in the shape of a Hugging Face `config.json`. No torch, no numpy."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvshare.checkpoints.gguf_header import GGUFHeader, read_header
from kvshare.errors import ConfigError

_SLIDING, _FULL = "sliding_attention", "full_attention"


def config_from_gguf(path: str | Path) -> dict[str, Any]:
    """The config of the language model in a GGUF file. Raises `CheckpointError` for a broken file, `ConfigError` for an unknown model."""
    return config_from_header(read_header(path))


def config_from_header(header: GGUFHeader) -> dict[str, Any]:
    """As `config_from_gguf`, of a header that was read already."""
    architecture = header.architecture
    if architecture not in _FAMILIES:
        raise ConfigError("general.architecture", f"{architecture!r} does not load from GGUF; known are {', '.join(sorted(_FAMILIES))}")
    keys = _Keys(header)
    if keys.get("expert_count", 0) and architecture != "gemma4":
        raise ConfigError(f"{architecture}.expert_count", "a mixture of experts of this architecture does not load from GGUF")
    return {**_common(keys), **_FAMILIES[architecture](keys)}


class _Keys:
    """Metadata under the architecture's prefix, and the shapes of tensors that say what metadata does not."""

    def __init__(self, header: GGUFHeader):
        self.header, self.prefix = header, header.architecture

    def get(self, name: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.prefix}.{name}", default)

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise self.wrong(name, "missing from the metadata")
        return value

    def number(self, name: str) -> int:
        value = self.need(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, f"must be an integer, not {str(value)[:80]}")
        return value

    def per_layer(self, name: str) -> list[Any]:
        """A value for each layer, of an array or of one number for all."""
        value, count = self.need(name), self.number("block_count")
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count:
            raise self.wrong(name, f"has {len(values)} entries for {count} layers")
        return values

    def shape(self, tensor: str) -> tuple[int, ...]:
        info = self.header.tensors.get(tensor)
        if info is None:
            raise ConfigError(tensor, f"missing from {self.header.path}")
        return info.shape

    def has(self, tensor: str) -> bool:
        return tensor in self.header.tensors

    def wrong(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.prefix}.{name}", problem)

    def layer_types(self, period: int | None = None) -> list[str]:
        """Attention types, of an array of booleans (true slides) or of a period of which the last layer sees everything."""
        pattern, count = self.get("attention.sliding_window_pattern", period), self.number("block_count")
        if pattern is None:
            raise self.wrong("attention.sliding_window_pattern", "missing from the metadata")
        if not isinstance(pattern, list):
            pattern = [(index + 1) % pattern != 0 for index in range(count)]
        if len(pattern) != count:
            raise self.wrong("attention.sliding_window_pattern", f"has {len(pattern)} entries for {count} layers")
        return [_SLIDING if slides else _FULL for slides in pattern]


def _common(keys: _Keys) -> dict[str, Any]:
    metadata = keys.header.metadata
    config = {
        "num_hidden_layers": keys.number("block_count"),
        "hidden_size": keys.number("embedding_length"),
        "num_attention_heads": keys.number("attention.head_count"),
        "max_position_embeddings": keys.number("context_length"),
        "rms_norm_eps": _shortest(keys.need("attention.layer_norm_rms_epsilon")),
        "vocab_size": keys.shape("token_embd.weight")[0],
        "tie_word_embeddings": not keys.has("output.weight"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: value for name, value in config.items() if value is not None}


def _llama(keys: _Keys) -> dict[str, Any]:
    heads = keys.number("attention.head_count")
    window = keys.get("attention.sliding_window")
    return {
        "model_type": "mistral" if window and keys.prefix == "llama" else keys.prefix,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": keys.get("attention.key_length") or keys.number("embedding_length") // heads,
        "intermediate_size": keys.number("feed_forward_length"),
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "rope_parameters": _rope(keys),
        **({"sliding_window": window} if window else {}),
    }


def _gemma3(keys: _Keys) -> dict[str, Any]:
    heads, width, layers = keys.number("attention.head_count"), keys.get("attention.key_length", 256), keys.number("block_count")
    # the 27B scales its queries by the width of the model over its heads; the file has no key for it
    scalar = keys.number("embedding_length") // heads if layers == 62 else width
    return {
        "model_type": "gemma3_text",
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": width,
        "query_pre_attn_scalar": scalar,
        "intermediate_size": keys.number("feed_forward_length"),
        "sliding_window": keys.number("attention.sliding_window"),
        "layer_types": keys.layer_types(period=6),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "attn_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {_FULL: _rope(keys), _SLIDING: _sliding_rope(keys)},
    }


def _gemma3n(keys: _Keys) -> dict[str, Any]:
    scales = keys.per_layer("activation_sparsity_scale")
    return {
        "model_type": "gemma3n_text",
        "num_key_value_heads": keys.number("attention.head_count_kv"),
        "head_dim": keys.number("attention.key_length"),
        "intermediate_size": keys.per_layer("feed_forward_length"),
        "activation_sparsity_pattern": [_share_below(scale) for scale in scales],
        "sliding_window": keys.number("attention.sliding_window"),
        "layer_types": keys.layer_types(),
        "num_kv_shared_layers": keys.number("attention.shared_kv_layers"),
        "hidden_size_per_layer_input": keys.number("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": keys.shape("per_layer_token_embd.weight")[0],
        "altup_num_inputs": keys.number("altup.num_inputs"),
        "altup_active_idx": keys.number("altup.active_idx"),
        "altup_correct_scale": keys.has("blk.0.altup_correct_scale.weight"),
        "laurel_rank": keys.shape("blk.0.laurel_l.weight")[0],
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {_FULL: _rope(keys), _SLIDING: _sliding_rope(keys)},
    }


def _gemma4(keys: _Keys) -> dict[str, Any]:
    types, shared = keys.layer_types(), keys.get("attention.shared_kv_layers", 0)
    owners = keys.number("block_count") - shared
    kv_heads, width = keys.per_layer("attention.head_count_kv"), keys.number("attention.key_length_swa")
    sliding = _same(keys, "attention.head_count_kv", [kv_heads[i] for i, kind in enumerate(types) if kind == _SLIDING])
    full = _same(keys, "attention.head_count_kv", [kv_heads[i] for i, kind in enumerate(types) if kind == _FULL])
    widths = keys.per_layer("feed_forward_length")
    narrow = _same(keys, "feed_forward_length", widths[:owners])
    wide = _same(keys, "feed_forward_length", widths[owners:] or [narrow])
    if wide not in (narrow, 2 * narrow):
        raise keys.wrong("feed_forward_length", f"is {narrow} in owning layers and {wide} in sharing ones: neither equal nor double")
    full_owners = [i for i in range(owners) if types[i] == _FULL]
    per_layer = keys.get("embedding_length_per_layer_input", 0)
    experts = keys.get("expert_count", 0)
    return {
        "model_type": "gemma4_text",
        "num_key_value_heads": sliding or full,
        "num_global_key_value_heads": full if full != sliding else None,
        "head_dim": width,
        "global_head_dim": keys.number("attention.key_length"),
        "attention_k_eq_v": bool(full_owners) and not any(keys.has(f"blk.{i}.attn_v.weight") for i in full_owners),
        "intermediate_size": narrow,
        "use_double_wide_mlp": wide != narrow,
        "sliding_window": keys.number("attention.sliding_window"),
        "layer_types": types,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": per_layer,
        **({"vocab_size_per_layer_input": keys.shape("per_layer_token_embd.weight")[0]} if per_layer else {}),
        "enable_moe_block": bool(experts),
        "num_experts": experts or None,
        "top_k_experts": keys.number("expert_used_count") if experts else None,
        "moe_intermediate_size": keys.number("expert_feed_forward_length") if experts else None,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            _FULL: {
                "rope_type": "proportional",
                "rope_theta": keys.get("rope.freq_base", 1e6),
                "partial_rotary_factor": _moving_share(keys),
            },
            _SLIDING: _sliding_rope(keys),
        },
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
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10_000.0)}
    kind = keys.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": keys.need("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = keys.need("rope.scaling.original_context_length")
    elif kind != "none":
        raise keys.wrong("rope.scaling.type", f"unknown value {kind!r}: known are none, linear, yarn")
    if keys.has("rope_freqs.weight"):
        rope |= _llama3(keys, rope["rope_theta"])
    return rope


def _sliding_rope(keys: _Keys) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)}


def _rope_divisors(keys: _Keys) -> list[float]:
    """What each rotated pair's frequency is divided by: the one tensor that is metadata."""
    info = keys.header.tensors["rope_freqs.weight"]
    if info.type.name != "F32":
        raise ConfigError("rope_freqs.weight", f"must be F32, not {info.type.name}")
    with keys.header.path.open("rb") as file:
        file.seek(info.offset)
        return list(struct.unpack(f"<{info.num_bytes // 4}f", file.read(info.num_bytes)))


def _moving_share(keys: _Keys) -> float:
    """Gemma 4 marks the pairs of its full layers that stand still with enormous divisors: the share of those that move."""
    if not keys.has("rope_freqs.weight"):
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


def _same(keys: _Keys, name: str, values: list[int]) -> int:
    if len(set(values)) > 1:
        raise keys.wrong(name, f"differs between layers of one kind: {sorted(set(values))}")
    return values[0] if values else 0


def _shortest(value: float) -> float:
    """The shortest decimal that is this 32-bit float: 1e-06 and not 9.999999974752427e-07."""
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("f", candidate) == struct.pack("f", value):
            return candidate
    return value

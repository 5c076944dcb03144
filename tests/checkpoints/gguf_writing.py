"""Random models of every architecture that loads from GGUF, and a writer that does to them what the usual conversion does.

Tensor names come from the `gguf` package's own tables, so that a name that the reader has wrong cannot be wrong here too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from parity.harness import randomise

S, F = "sliding_attention", "full_attention"
TYPES = gguf.GGMLQuantizationType
Encode = Callable[[np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]

_PLAIN: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_PLAIN, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "qwen3": {**_PLAIN, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gemma3_text": {**_PLAIN, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **_PLAIN,
        **_PER_LAYER,
        "intermediate_size": [96] * 6,
        "layer_types": [S, S, F, F, S, F],
        "sliding_window": 8,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        **_PLAIN,
        **_PER_LAYER,
        "num_key_value_heads": 1,
        "global_head_dim": 32,
        "layer_types": [S, S, F, F, S, F],
        "sliding_window": 8,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_text, experts": {
        **_PLAIN,
        "num_global_key_value_heads": 1,
        "global_head_dim": 32,
        "layer_types": [S, F] * 2,
        "sliding_window": 8,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "final_logit_softcapping": 30.0,
    },
}


def random_model(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """transformers' own model of one of `CONFIGS`, every parameter random."""
    config = transformers.AutoConfig.for_model(family.split(",")[0], **{**CONFIGS[family], **changes})
    return randomise(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def as_float32(array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    return array.astype(np.float32), TYPES.F32


def quantized(kind: gguf.GGMLQuantizationType) -> Encode:
    """An encoder that quantizes matrices and leaves the rest in float32, as converters do."""

    def encode(array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        if array.ndim < 2 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            return as_float32(array)
        try:
            return gguf.quantize(array, kind), kind
        except NotImplementedError:  # the package cannot quantize to this type: any blocks with finite scales will do
            return _random_blocks(array.shape, kind), kind

    return encode


def write_gguf(path: Path, model: transformers.PreTrainedModel, encode: Encode = as_float32, **metadata: Any) -> Path:
    """`model` as a GGUF file. `metadata` adds keys (with `__` for the dots) as strings, booleans, integers, floats or lists."""
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    _write_config(writer, config, model)
    for name, value in metadata.items():
        _add(writer, name.replace("__", "."), value)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, array in _converted(model, architecture):
        new = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        data, kind = encode(array)
        writer.add_tensor(new, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(model: transformers.PreTrainedModel, architecture: str) -> list[tuple[str, np.ndarray]]:
    """Names (Hugging Face's where the package's tables know them, else the final ones) and what the conversion makes of the numbers."""
    config, out, stacks = model.config, [], {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if name.startswith(("model.altup_projections", "model.altup_unembed_projections")):
            stacks.setdefault(name.split(".")[1], []).append(array)
            continue
        block = f"blk.{name.split('.')[2]}" if name.startswith("model.layers.") else ""
        if name.endswith("router.scale"):
            name = f"{block}.ffn_gate_inp.scale"
        elif name.endswith("router.per_expert_scale"):
            name = f"{block}.ffn_down_exps.scale"
        elif not name.endswith((".weight", ".bias")):  # parameters of modules that are no layers get the suffix that all others have
            name += ".weight"
        out.append((name, array))
    out += [(f"model.{stem}.weight", np.stack(arrays)) for stem, arrays in stacks.items()]
    if architecture == "gemma4":
        rope = config.rope_parameters[F]
        pairs = config.to_dict().get("global_head_dim", 32) // 2
        moving = int(pairs * rope["partial_rotary_factor"])
        out.append(("rope_freqs.weight", np.array([1.0] * moving + [1e30] * (pairs - moving), np.float32)))
    return out


def _write_config(writer: gguf.GGUFWriter, config: Any, model: transformers.PreTrainedModel) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    wide = config.num_kv_shared_layers if getattr(config, "use_double_wide_mlp", False) else 0
    width, narrow = config.intermediate_size, config.num_hidden_layers - wide
    writer.add_feed_forward_length([width] * narrow + [2 * width] * wide if wide else width)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if config.model_type in ("llama", "qwen3"):
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        return
    writer.add_rope_freq_base(config.rope_parameters[F]["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters[S]["rope_theta"])
    writer.add_sliding_window(config.sliding_window)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma4_text":
        _write_gemma4(writer, config)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    if config.model_type == "gemma3n_text":
        writer.add_sliding_window_pattern([kind == S for kind in config.layer_types])
        writer.add_altup_active_idx(config.altup_active_idx)
        writer.add_altup_num_inputs(config.altup_num_inputs)
        writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
        writer.add_shared_kv_layers(config.num_kv_shared_layers)
        normal = torch.distributions.normal.Normal(0, 1)
        writer.add_activation_sparsity_scale([normal.icdf(torch.tensor(share)).item() for share in config.activation_sparsity_pattern])


def _write_gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    sliding = [kind == S for kind in config.layer_types]
    own = config.to_dict()
    full_width, full_heads = own.get("global_head_dim") or 32, own.get("num_global_key_value_heads")
    kv_heads = CONFIGS["gemma4_text, experts" if config.enable_moe_block else "gemma4_text"]["num_key_value_heads"]
    writer.add_sliding_window_pattern(sliding)
    writer.add_head_count_kv([kv_heads if slides else full_heads or 1 for slides in sliding] if config.enable_moe_block else kv_heads)
    writer.add_key_length(full_width)
    writer.add_key_length_swa(_PLAIN["head_dim"])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of random integers whose 16-bit scales are small numbers."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(sum(shape))
    blocks = generator.integers(0, 256, (int(np.prod(shape)) // size, num_bytes), dtype=np.uint8)
    for at in (208,) if kind == TYPES.Q6_K else (0, 2):
        blocks[:, at : at + 2] = generator.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    kinds[type(value)](name, value)

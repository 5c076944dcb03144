"""The model families, one a file. `MODELS` names file and class for each `model_type`; nothing else in the engine asks which model runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvshare.errors import ConfigError
from kvshare.layout import layout_from_config
from kvshare.layout.config import Fields, text_config
from kvshare.layout.rules.sharing import reader_projections

if TYPE_CHECKING:
    import torch

    from kvshare.models.gemma4_assistant import Gemma4Assistant
    from kvshare.models.model import Model

MODELS: Mapping[str, str] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "kvshare.models.llama:Llama"),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32"), "kvshare.models.deepseek_v3:DeepseekV3"),
    "deepseek_v4": "kvshare.models.deepseek_v4:DeepseekV4",
    **dict.fromkeys(("gemma3", "gemma3_text"), "kvshare.models.gemma3:Gemma3"),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "kvshare.models.gemma3n:Gemma3n"),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), "kvshare.models.gemma4:Gemma4"),
    "laguna": "kvshare.models.laguna:Laguna",
    "zaya": "kvshare.models.zaya:Zaya",
}


DRAFTERS = ("gemma4_assistant", "gemma4_unified_assistant")
"""Architectures that own no cache and draft tokens for another model: `build_drafter`."""


def build_model(config: Mapping[str, Any], dtype: torch.dtype, kv_form: str = "plain") -> Model:
    """The model of a config, with parameters of `dtype` on the meta device, to be filled by `checkpoints.weights.load_weights`.

    Raises `ConfigError` for an architecture that no family here runs, even if the planner can size it.
    """
    import torch

    config = text_config(config)
    layout = layout_from_config(config, kv_form).with_states_in({torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32"))
    model_type = config["model_type"]
    if model_type in DRAFTERS:
        raise ConfigError("model_type", f"{model_type!r} is a drafter: it owns no cache and runs beside the model that it drafts for")
    if model_type not in MODELS:
        raise ConfigError("model_type", f"{model_type!r} can be planned but not run yet; run are {', '.join(sorted(MODELS))}")
    module, name = MODELS[model_type].split(":")
    family = getattr(importlib.import_module(module), name)
    if reader_projections(Fields(config)) and not family.takes_reader_projections:
        raise ConfigError("kv_sharing_projections", f"{model_type} runs owner maps, but without projections of its readers")
    with torch.device("meta"):
        model = family(config, layout)
    return model.to(dtype)


def build_drafter(config: Mapping[str, Any], dtype: torch.dtype, target: Model) -> Gemma4Assistant:
    """The drafter of a config, bound to the model that it drafts for, with parameters of `dtype` on the meta device (see `build_model`).

    Raises `ConfigError` for what is no drafter, and for a drafter that was made for another model.
    """
    import torch

    from kvshare.models.gemma4 import Gemma4
    from kvshare.models.gemma4_assistant import Gemma4Assistant

    config = text_config(config)
    if config.get("model_type") not in DRAFTERS:
        raise ConfigError("model_type", f"{config.get('model_type')!r} is no drafter: known are {', '.join(DRAFTERS)}")
    if not isinstance(target, Gemma4):
        raise ConfigError("model_type", f"{config['model_type']} drafts for Gemma 4, not for {target.layout.model_type}")
    with torch.device("meta"):
        drafter = Gemma4Assistant(config, target)
    return drafter.to(dtype)

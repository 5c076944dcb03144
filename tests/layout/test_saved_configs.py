"""Configs as transformers saves them (defaults filled in, fields renamed) give the layout of the config that was published."""

from __future__ import annotations

import json

import pytest
from layout.families import FAMILIES, V4
from transformers import CONFIG_MAPPING

from kvshare.layout import layout_from_config


@pytest.mark.parametrize("only_differences", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, "deepseek_v4"])
def test_a_saved_config_gives_the_same_layout(name: str, only_differences: bool):
    model_type, config = FAMILIES.get(name, ("deepseek_v4", V4))
    saved = json.loads(CONFIG_MAPPING[model_type](**config).to_json_string(use_diff=only_differences))
    published = layout_from_config({"model_type": model_type, **config})
    assert layout_from_config(saved).layers == published.layers
    assert layout_from_config({"model_type": "some_multimodal_model", "text_config": saved}).layers == published.layers

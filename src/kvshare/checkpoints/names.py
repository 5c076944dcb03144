"""Names of tensors in Hugging Face checkpoints: what belongs to the language model, and what its names are without a multimodal wrapper."""

from __future__ import annotations

from collections.abc import Iterable

from kvshare.errors import CheckpointError

_PREFIXES = (
    ("model.language_model.", "model."),  # multimodal models saved by transformers 5
    ("language_model.model.", "model."),  # the same, saved by transformers 4
    ("language_model.lm_head.", "lm_head."),
)

_TOWERS = (
    "vision_tower",
    "vision_model",
    "vision_embedder",
    "visual",
    "embed_vision",
    "audio_tower",
    "audio_model",
    "embed_audio",
    "multi_modal_projector",
)


def is_tower(name: str) -> bool:
    """Whether a tensor belongs to an image or audio tower or to its projection into the language model."""
    return name.removeprefix("model.").split(".", 1)[0] in _TOWERS


def text_model_name(name: str) -> str:
    """The name without the prefix of a multimodal wrapper."""
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def text_model_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Language-model names mapped to the names in the file, and what was skipped. Two files' names for one tensor are refused."""
    kept: dict[str, str] = {}
    skipped = []
    for name in names:
        if is_tower(name):
            skipped.append(name)
            continue
        short = text_model_name(name)
        if short in kept:
            raise CheckpointError(f"the tensors {kept[short]!r} and {name!r} both stand for {short!r}: the checkpoint is ambiguous")
        kept[short] = name
    return kept, tuple(sorted(skipped))

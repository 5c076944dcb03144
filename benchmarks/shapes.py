"""Checkpoints with random weights in the true shape of a released model, written once and kept: the same bytes for every engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 2_000_000_000
SHAPES = {"gemma-4-e2b": "gemma-4-E2B", "gemma-3n-e2b": "gemma-3n-E2B-it"}


def checkpoint(shape: str, where: Path) -> Path:
    """The directory of `shape`'s checkpoint below `where`, made if it is not there (deviation 0.02, norms near one)."""
    from kvshare.layout.config import text_config
    from kvshare.planner.models import resolve

    directory = where / shape
    if (directory / "config.json").exists():
        return directory
    import transformers

    config = text_config(resolve(SHAPES[shape]).config)
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(1 << 25, generator=generator) * 0.02).bfloat16()
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write_shard() -> None:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            write_shard()
        shard[name] = _fill(name, tensor, pool, generator)
    write_shard()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _write_tokenizer(directory, config["vocab_size"])
    # under the names of the release as well: other engines' readers know those
    saved = {**model.config.to_dict(), **settings, "architectures": [type(model).__name__], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(saved, indent=1))
    return directory


def _write_tokenizer(directory: Path, size: int) -> None:
    """A word for nearly each id, spelled by merges and bytes as Gemma's are: that is what llama.cpp's converter takes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    spelled = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "t", *"0123456789"]
    words = [f"t{number}" for number in range(size - len(spelled))]
    merges = [(word[:-1], word[-1]) for word in words]
    vocabulary = {text: index for index, text in enumerate(spelled + words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {f"{text.strip('<>')}_token": text for text in special}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}))


def unpacked(gguf: Path, where: Path, change: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight) -> Path:
    """A GGUF file's weights, dequantized to bf16, as a Hugging Face directory: what peers load that do not read the file.

    `change` is done to the matrices of linear layers first. The tokenizer is as large as the model's, and not the model's.
    """
    from kvshare.checkpoints import open_checkpoint

    directory = where / gguf.stem
    if not (directory / "tokenizer.json").exists():
        import transformers

        source = open_checkpoint(gguf)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: source.get(name) for name in source.names()}
        tensors = {
            name: (change(each) if name.endswith("_proj.weight") else each).bfloat16().contiguous() for name, each in tensors.items()
        }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        family = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[source.config["model_type"]]
        config = {**source.config, "architectures": [family], "dtype": "bfloat16"}
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        _write_tokenizer(directory, config["vocab_size"])
    return directory


def _fill(name: str, like: torch.Tensor, pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.ndim < 2:
        near_one = "norm" in name or name.endswith(("scalar", "scale"))
        return (near_one + 0.02 * torch.randn(like.shape, generator=generator)).bfloat16()
    values = torch.empty(like.numel(), dtype=torch.bfloat16)
    for start in range(0, len(values), len(pool)):
        part = values[start : start + len(pool)]
        part.copy_(pool[: len(part)])
    return values.view(like.shape)

"""Checkpoints in DeepSeek's published layouts load to exactly the numbers that their bits stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.harness import load, one_shot, random_ids
from parity.test_deepseek_v4 import BASE, build, released_name
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.deepseek_quantized import dequantize_fp4, dequantize_fp8
from kvshare.errors import CheckpointError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
FP8_NAMES = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "shared_experts.w1", "shared_experts.w2", "shared_experts.w3")
SIZES = {"hidden_size": 160, "moe_intermediate_size": 64, "q_lora_rank": 136}  # blocks of 128 end inside the matrices


def value_of_e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 128 else size


def value_of_e2m1(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code]


def quantize_fp8(weight: Tensor, exponent: int) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 values, e8m0 scales that differ from block to block, and the numbers that both stand for, worked out byte by byte."""
    rows, columns = weight.shape
    grid = torch.arange(-(-rows // 128) * -(-columns // 128)).view(-(-rows // 128), -1) % 3
    scale = torch.exp2(grid.float() + exponent)
    spread = torch.tensor([[scale[row // 128, column // 128].item() for column in range(columns)] for row in range(rows)])
    values = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    table = torch.tensor([value_of_e4m3(byte) for byte in range(256)])
    return values, scale.to(torch.float8_e8m0fnu), table[values.view(torch.uint8).long()] * spread


def quantize_fp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed pairs, the first in the low half; e8m0 scales of 32 numbers; and the numbers that both stand for."""
    groups = weight.unflatten(1, (-1, 32))
    scale = torch.exp2((groups.abs().amax(-1) / 6).log2().ceil())  # [rows, columns / 32]
    table = torch.tensor([value_of_e2m1(code) for code in range(16)])
    codes = (groups[..., None] / scale[..., None, None] - table).abs().argmin(-1)  # [rows, groups, 32]
    pairs = codes.flatten(1).unflatten(1, (-1, 2))
    packed = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8).view(torch.int8)
    return packed, scale.to(torch.float8_e8m0fnu), (table[codes] * scale[..., None]).flatten(1)


def write_both(plain: Path, published: Path) -> None:
    """One model twice: as bfloat16 numbers, and as FP8 and FP4 that stand for the same numbers."""
    build(**SIZES).save_pretrained(plain)
    tensors = {released_name(name): tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    exact, stored = {}, {}
    for position, (name, tensor) in enumerate(sorted(tensors.items())):
        scale_name = name.removesuffix(".weight") + ".scale"
        compressor = ".compressor." in name or ".indexer.weights_proj" in name
        if ".experts." in name and "shared" not in name:
            stored[name], stored[scale_name], exact[name] = quantize_fp4(tensor)
        elif any(f".{part}.weight" in name for part in FP8_NAMES) and not compressor:
            stored[name], stored[scale_name], exact[name] = quantize_fp8(tensor, -8 - position % 3)
        else:
            stored[name] = exact[name] = tensor
    config = {"model_type": "deepseek_v4", "routed_scaling_factor": 1.5, **BASE, **SIZES}
    published.mkdir()
    (plain / "config.json").write_text(json.dumps(config))
    (published / "config.json").write_text(json.dumps({**config, "expert_dtype": "fp4", "quantization_config": QUANTIZATION}))
    save_file(exact, plain / "model.safetensors")
    save_file(stored, published / "model.safetensors")


def test_published_layout_loads_to_the_same_model(tmp_path: Path) -> None:
    write_both(tmp_path / "plain", tmp_path / "published")
    checkpoint = open_checkpoint(tmp_path / "published")
    assert checkpoint.shape("layers.0.ffn.experts.0.w1.weight") == (SIZES["moe_intermediate_size"], SIZES["hidden_size"])
    assert not any(name.endswith(".scale") for name in checkpoint.names())
    ids = random_ids(BASE["vocab_size"])
    plain, published = load(tmp_path / "plain"), load(tmp_path / "published")
    for (name, ours), (_, expected) in zip(published.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(ours, expected), name
    assert torch.equal(one_shot(published, ids), one_shot(plain, ids))


def test_v3_scales_are_floats_named_weight_scale_inv(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 300, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator)
    save_file({"a.weight": weight, "a.weight_scale_inv": scale, "b.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "quantization_config": QUANTIZATION}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == {"a.weight", "b.weight"}
    got = checkpoint.get("a.weight")
    assert got.dtype == torch.float32
    for row, column in ((0, 0), (127, 128), (128, 127), (199, 299)):
        assert got[row, column] == weight[row, column].float() * scale[row // 128, column // 128]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.zeros(128, 128, dtype=torch.float8_e4m3fn)}, "no scale beside it"),
        ({"a.weight": torch.zeros(129, 128, dtype=torch.float8_e4m3fn), "a.scale": torch.ones(1, 1)}, r"\[1, 1\].*\(2, 1\)"),
        ({"a.weight": torch.zeros(4, 32, dtype=torch.int8), "a.scale": torch.ones(4, 1)}, r"\[4, 1\].*\(4, 2\)"),
        ({"a.weight": torch.zeros(4, 32), "a.scale": torch.ones(1, 1)}, "is F32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "quantization_config": QUANTIZATION}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_fp8_without_blocks_is_refused(tmp_path: Path) -> None:
    quantization: dict[str, Any] = {**QUANTIZATION, "weight_block_size": None}
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "quantization_config": quantization}))
    with pytest.raises(CheckpointError, match="weight_block_size is None"):
        open_checkpoint(tmp_path)


def test_every_code_stands_for_its_number() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    finite = bytes_[(bytes_ & 127) != 127]  # the two others are NaN
    values = dequantize_fp8(finite.view(1, -1).view(torch.float8_e4m3fn), torch.ones(1, 2), (128, 128))
    assert values[0].tolist() == [value_of_e4m3(int(byte)) for byte in finite]
    pairs = dequantize_fp4(bytes_.view(16, 16).view(torch.int8), torch.full((16, 1), 0.25))
    expected = [0.25 * value_of_e2m1(code) for byte in range(256) for code in (byte & 15, byte >> 4)]
    assert pairs.flatten().tolist() == expected

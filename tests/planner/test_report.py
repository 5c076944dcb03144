"""The library's side of planning: arguments, limits, plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvshare.errors import CapacityError, ConfigError, RequestError
from kvshare.planner import ModelConfig, ModelPlan, check_fits, plan
from kvshare.planner.plot import save_plot
from kvshare.planner.report import _largest

GB = 10**9


def test_the_context_defaults_to_128k_or_the_models_own_limit():
    assert plan("gemma-4-E2B").context == 131_072
    assert plan("gemma-3n-E2B-it").context == 32_768
    assert plan("DeepSeek-V4-Flash").context == 131_072


def test_a_context_beyond_the_models_limit_is_planned_with_a_warning():
    report = plan("gemma-3n-E2B-it", 131_072)
    assert report.kv_bytes["total"] == 1_090_519_040
    assert "131,072 tokens are more than the 32,768" in report.warnings[-1]


def test_the_longest_context_stops_at_the_models_own_limit():
    assert plan("gemma-4-E2B", memory=24 * GB).max_context == 131_072
    report = plan("gemma-4-31B", memory=64 * GB)
    assert report.max_context is not None
    assert report.max_context < 131_072
    assert not report.fits


@pytest.mark.parametrize("memory", [62 * GB, 64 * GB, 70 * GB, 75 * GB])
@pytest.mark.parametrize("batch", [1, 3])
def test_longest_context_and_largest_batch_are_the_edge_of_what_fits(memory: int, batch: int):
    report = plan("gemma-4-31B", 8192, batch, memory=memory)
    assert report.weights is not None
    left = memory - report.weights.bytes
    assert report.max_context is not None
    assert report.max_batch is not None
    if report.max_context:
        assert report.layout.peak_bytes(report.max_context, batch) <= left
    assert report.layout.peak_bytes(report.max_context + 1, batch) > left
    assert report.layout.peak_bytes(8192, report.max_batch + 1) > left
    assert report.fits == (report.max_context >= 8192) == (report.max_batch >= batch)


@pytest.mark.parametrize("edge", [0, 1, 2, 3, 7, 8, 99, 100])
def test_search_for_the_largest(edge: int):
    assert _largest(lambda number: number <= edge, 100) == edge
    assert _largest(lambda number: True, edge or 1) == (edge or 1)


def test_weights_at_lower_precisions():
    sizes = {name: plan("Llama-3.1-8B", weights=name).weights for name in ("bf16", "int8", "int4")}
    assert {name: weights and weights.bytes for name, weights in sizes.items()} == {
        "bf16": 2 * 8_030_261_248,
        "int8": 8_030_261_248 * 34 // 32,
        "int4": 8_030_261_248 * 18 // 32,
    }


def test_precisions_of_the_cache():
    full = plan("Llama-3.1-8B", kv_dtype="bf16").kv_bytes["total"]
    rows = {"fp16": 256, "fp32": 512, "fp8": 128 + 2, "int8": 128 + 2, "int4": 64 + 4 * 4}
    for name, size in rows.items():
        assert plan("Llama-3.1-8B", kv_dtype=name).kv_bytes["total"] * 256 == full * size


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"context": -1}, "context"),
        ({"batch": 0}, "batch"),
        ({"memory": 0}, "memory"),
        ({"kv_dtype": "int3"}, "kv_dtype"),
        ({"weights": "int2"}, "weights"),
        ({"kv_layout": "k-only"}, "kv_layout"),
    ],
)
def test_wrong_arguments_are_refused_with_their_name(options: dict[str, Any], field: str):
    with pytest.raises(ConfigError) as caught:
        plan("gemma-4-E2B", **options)
    assert caught.value.field == field


def test_what_does_not_fit_raises_with_the_numbers_and_the_remedy():
    with pytest.raises(CapacityError, match=r"need 72,\d{3},\d{3},\d{3} B.*a context of \d"):
        check_fits(plan("gemma-4-31B", 120_000, memory=64 * GB))
    check_fits(plan("gemma-4-31B", memory=80 * GB))
    check_fits(plan("gemma-4-31B"))


def test_a_drafter_costs_nothing():
    config = {"model_type": "gemma4_assistant", "text_config": {"num_hidden_layers": 4}}
    report = plan(ModelConfig("drafter", config, "made up here", "drafter"))
    assert report.kv_bytes["total"] == report.peak_bytes == 0
    assert json.dumps(report.to_json())


def test_gguf_metadata_is_read_like_a_config(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 3),
        (writer.add_context_length, 4096),
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_vocab_size, 100),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
    ):
        add(value)
    import numpy

    writer.add_tensor("token_embd.weight", numpy.zeros((100, 64), numpy.float32))
    for layer in range(3):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", numpy.zeros(64, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = plan(str(path))
    assert report.context == 4096
    assert report.kv_bytes["total"] == 4096 * 3 * 2 * 2 * 16 * 2


class TestPlot:
    @pytest.fixture
    def reports(self) -> list[ModelPlan]:
        return [plan("gemma-4-E2B", memory=24 * GB), plan("Llama-3.1-8B", memory=24 * GB), plan("DeepSeek-V4-Flash")]

    def test_svg_has_a_line_for_each_model(self, reports: list[ModelPlan], tmp_path: Path):
        save_plot(reports, tmp_path / "cache.svg")
        text = (tmp_path / "cache.svg").read_text()
        assert text.startswith("<?xml")
        for report in reports:
            assert f"<!-- {report.model.name} -->" in text

    def test_png_of_one_model(self, reports: list[ModelPlan], tmp_path: Path):
        save_plot(reports[:1], tmp_path / "cache.png")
        assert (tmp_path / "cache.png").read_bytes()[:4] == b"\x89PNG"

    def test_more_models_than_colours(self, tmp_path: Path):
        from kvshare.planner import bundled_names

        save_plot([plan(name) for name in bundled_names()], tmp_path / "cache.svg")

    def test_other_files_are_refused(self, reports: list[ModelPlan], tmp_path: Path):
        with pytest.raises(RequestError, match=r"must end in \.svg or \.png"):
            save_plot(reports, tmp_path / "cache.pdf")

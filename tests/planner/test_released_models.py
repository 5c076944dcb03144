"""The figures of released models, as integers: from an independent script's formulas and from transformers' modules on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvshare.planner import bundled_names, plan

T = 131_072
GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Figures:
    """Cache bytes in bf16 at 131,072 tokens, rounded figures (GB) of the same without sharing, windows and both, and bytes a token."""

    served: int
    no_sharing: float
    no_windows: float
    neither: float
    per_token: int


RELEASED = {
    "gemma-3n-E2B-it": Figures(1_090_519_040, 1.636, 5.369, 8.053, 8192),
    "gemma-3n-E4B-it": Figures(1_090_519_040, 1.908, 5.369, 9.395, 8192),
    "gemma-4-E2B": Figures(811_597_824, 1.894, 2.416, 5.637, 6144),
    "gemma-4-E4B": Figures(2_168_455_168, 3.795, 7.516, 13.153, 16384),
    "gemma-4-12B-it": Figures(2_483_027_968, 2.483, 45.097, 45.097, 16384),
    "gemma-4-26B-A4B": Figures(2_894_069_760, 2.894, 29.528, 29.528, 20480),
    "gemma-4-31B": Figures(11_576_279_040, 11.576, 118.112, 118.112, 81920),
    "Laguna-XS.2": Figures(5_431_623_680, 5.432, 21.475, 21.475, 40960),
    "Laguna-XS-2.1": Figures(5_431_623_680, 5.432, 21.475, 21.475, 40960),
    "Laguna-S-2.1": Figures(6_517_948_416, 6.518, 25.770, 25.770, 49152),
    "ZAYA1-8B": Figures(5_368_709_120 + 215_040, 5.369, 5.369, 5.369, 40960),
    "ZAYA1-8B-legacy": Figures(5_368_709_120 + 2 * 215_040, 5.369, 5.369, 5.369, 40960),
    "DeepSeek-V4-Flash": Figures(919_617_536, 0.920, 6.685, 6.685, 6880),
    "DeepSeek-V4-Pro": Figures(1_317_502_976, 1.318, 9.497, 9.497, 9848),
    "DeepSeek-V3.2": Figures(11_257_511_936, 11.258, 11.258, 11.258, 85888),
    "Llama-3.1-8B": Figures(17_179_869_184, 17.180, 17.180, 17.180, 131072),
    "Qwen3-8B": Figures(19_327_352_832, 19.327, 19.327, 19.327, 147456),
}


@pytest.mark.parametrize("name", RELEASED)
def test_cache_of_a_released_model(name: str):
    report, figures = plan(name, T), RELEASED[name]
    assert report.kv_bytes["total"] == figures.served
    assert report.bytes_per_token == figures.per_token
    assert round(report.without.sharing / GB, 3) == figures.no_sharing
    assert round(report.without.windows / GB, 3) == figures.no_windows
    assert round(report.without.both / GB, 3) == figures.neither


def test_every_bundled_model_is_among_them():
    assert {*RELEASED, "DeepSeek-V4.1-Flash"} == set(bundled_names())


@pytest.mark.parametrize(
    ("name", "form", "total"),
    [
        ("gemma-4-12B-it", "v-only", 1_409_286_144),
        ("gemma-4-26B-A4B", "v-only", 1_551_892_480),
        ("gemma-4-31B", "v-only", 6_207_569_920),
        ("gemma-4-31B", "compact", 11_576_279_040 - 10_737_418_240 * 3 // 8),
        ("gemma-4-E2B", "v-only", 811_597_824),
    ],
)
def test_compact_forms_of_keys_that_equal_values(name: str, form: str, total: int):
    assert plan(name, T, kv_layout=form).kv_bytes["total"] == total


@pytest.mark.parametrize(
    ("name", "tokens", "total"),
    [
        ("DeepSeek-V4-Flash", T, 476_040_192),
        ("DeepSeek-V4-Pro", T, 682_750_976),
        ("DeepSeek-V4-Flash", 8 * T, 3_700_378_624),
        ("DeepSeek-V4-Pro", 8 * T, 5_299_115_008),
        ("DeepSeek-V3.2", T, 6_300_368_896),
    ],
)
def test_native_formats(name: str, tokens: int, total: int):
    assert plan(name, tokens, kv_dtype="native").kv_bytes["total"] == total


def test_v41_gives_the_bytes_a_token_that_its_authors_state():
    assert plan("DeepSeek-V4.1-Flash", kv_dtype="native").bytes_per_token == 890
    assert plan("DeepSeek-V4.1-Flash").bytes_per_token == 3200


def test_what_sharing_alone_saves_once_windows_are_counted():
    """Not the 2.7 and 6 GB that are widely quoted."""
    saved = {name: plan(name, T).without.sharing - plan(name, T).kv_bytes["total"] for name in ("gemma-4-E2B", "gemma-4-E4B")}
    assert saved == {"gemma-4-E2B": 1_082_130_432, "gemma-4-E4B": 1_626_341_376}


def test_readers_read_their_owner_again():
    """E2B stores 6,144 bytes a token and reads 14,336 of them in a decode step."""
    one, two = plan("gemma-4-E2B", T - 1), plan("gemma-4-E2B", T)
    assert two.read_bytes - one.read_bytes == 14_336
    assert two.kv_bytes["total"] - one.kv_bytes["total"] == 6_144


@pytest.mark.parametrize(
    ("name", "tokens", "naive", "sharing", "windows", "both"),
    [  # GiB: the same with every layer full; with sharing alone; with windows alone; with both
        ("gemma-4-E2B", 32_768, 1.312, 0.562, 0.451, 0.193),
        ("gemma-4-E2B", T, 5.250, 2.250, 1.764, 0.756),
        ("gemma-4-E4B", T, 12.25, 7.000, 3.534, 2.020),
        ("gemma-4-26B-A4B", T, 27.5, 27.5, 2.695, 2.695),
        ("gemma-4-31B", 2 * T, 220.0, 220.0, 20.78, 20.78),
        ("Laguna-XS.2", T, 20.0, 20.0, 5.06, 5.06),
    ],
)
def test_what_each_technique_saves(name: str, tokens: int, naive: float, sharing: float, windows: float, both: float):
    report = plan(name, tokens)
    found = (report.without.both, report.without.windows, report.without.sharing, report.kv_bytes["total"])
    for count, quoted in zip(found, (naive, sharing, windows, both), strict=True):
        digits = len(str(quoted).partition(".")[2])
        assert abs(count / GIB - quoted) <= 0.51 * 10**-digits


PARAMETERS = {  # (all, per-layer embedding tables), from transformers' modules built on the meta device
    "gemma-3n-E2B-it": (4_435_182_688, 2_013_265_920),
    "gemma-3n-E4B-it": (6_835_235_568, 2_348_810_240),
    "gemma-4-E2B": (4_628_569_344, 2_348_810_240),
    "gemma-4-E4B": (7_463_013_376, 2_818_572_288),
    "gemma-4-12B-it": (11_907_350_272, 0),
    "gemma-4-26B-A4B": (25_233_141_760, 0),
    "gemma-4-31B": (30_697_345_280, 0),
    "Laguna-XS.2": (33_442_617_088, 0),
    "Laguna-XS-2.1": (33_442_617_088, 0),
    "Laguna-S-2.1": (117_561_977_600, 0),
    "ZAYA1-8B": (8_840_488_784, 0),
    "ZAYA1-8B-legacy": (8_840_488_784, 0),
    "DeepSeek-V4-Flash": (284_332_230_231, 0),
    "DeepSeek-V4-Pro": (1_572_997_179_491, 0),
    "DeepSeek-V3.2": (671_877_929_216, 0),
    "Llama-3.1-8B": (8_030_261_248, 0),
    "Qwen3-8B": (8_190_735_360, 0),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_of_a_released_model(name: str):
    weights = plan(name).weights
    assert weights is not None
    assert (weights.parameters.total, weights.parameters.per_layer_tables) == PARAMETERS[name]
    assert weights.bytes == 2 * weights.parameters.resident
    assert weights.per_layer_table_bytes == 2 * weights.parameters.per_layer_tables


def test_every_bundled_config_says_where_it_comes_from():
    for name in bundled_names():
        report = plan(name)
        assert len(report.model.source) > 20
        assert report.model.repository.count("/") == 1


# Printed by `calculate_cache_size` of kvcache-simulator 0.1.3 (PyPI), from its own list of models, with 16-bit caches and indexer
# keys. It does not count the blocks that DeepSeek V4's compressors keep open.
KVCACHE_SIMULATOR = {
    "gemma-4-E2B": {32_768: 207_618_048, T: 811_597_824},
    "gemma-4-E4B": {32_768: 557_842_432, T: 2_168_455_168},
    "gemma-4-26B-A4B": {32_768: 880_803_840, T: 2_894_069_760},
    "gemma-4-31B": {32_768: 3_523_215_360, T: 11_576_279_040},
    "DeepSeek-V4-Flash": {32_768: 231_079_936, T: 907_411_456},
    "DeepSeek-V4-Pro": {32_768: 330_694_656, T: 1_298_792_448},
    "DeepSeek-V3.2": {32_768: 2_814_377_984, T: 11_257_511_936},
    "Qwen3-8B": {32_768: 4_831_838_208, T: 19_327_352_832},
    "Llama-3.1-8B": {32_768: 4_294_967_296, T: 17_179_869_184},
}


@pytest.mark.parametrize("name", KVCACHE_SIMULATOR)
def test_another_calculator_counts_the_same(name: str):
    for tokens, total in KVCACHE_SIMULATOR[name].items():
        report = plan(name, tokens)
        assert report.kv_bytes["total"] - report.kv_bytes["state"] == total

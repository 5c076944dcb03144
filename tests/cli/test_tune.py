"""`kvshare tune` on a random model and on the demo's: targets are met, bytes are what the engine then holds, mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny as tiny_model
from cli.command import Command

from kvshare import LLM, SamplingParams
from kvshare.errors import ConfigError
from kvshare.evaluation.divergence import Sums, divergences
from kvshare.layout import CacheLayout, LayerCache, Stream
from kvshare.layout.precision import describe_precision, read_precision
from kvshare.planner import plan
from kvshare.tuning.assignment import greedy_path
from kvshare.tuning.candidates import candidates_for
from kvshare.tuning.journal import Journal, journal_for
from kvshare.tuning.tune import tune

SHORT = ("--tokens", 96, "--window", 48)


def test_the_greedy_path_takes_what_saves_most_for_each_nat() -> None:
    options = {
        0: {"bf16": (100, 0.0), "int8": (50, 0.001), "int4": (30, 0.010)},
        3: {"bf16": (1000, 0.0), "int8": (500, 0.100), "int4": (300, 0.101)},
    }
    path = greedy_path(options, "bf16")
    assert path[0] == {0: "bf16", 3: "bf16"}
    assert path[1:] == [{0: "int8", 3: "bf16"}, {0: "int8", 3: "int4"}, {0: "int4", 3: "int4"}]


def test_newest_rows_are_candidates_where_every_owner_can_keep_them() -> None:
    values = Stream("v", 1, 64)
    whole, compact = ((LayerCache("full", 0, streams),) for streams in ((Stream("k", 1, 64), values), (values,)))
    assert all("+" in name for name in candidates_for(CacheLayout(whole)))
    names = candidates_for(CacheLayout(compact))
    assert names
    for name in names:
        CacheLayout(compact).stored_in(name)


@pytest.mark.parametrize("target", [1e-5, 1e-3, 3e-2, 10.0])
def test_the_target_is_met_by_the_assignment_as_a_whole(target: float) -> None:
    model, windows = tiny_model.model(), [list(range(3, 60))]
    found = tune(model, windows, target, ("int8", "int4", "rot3"), context=200)
    measured = divergences(model, windows, "bf16", [{**found.chosen}])[0]
    assert measured.kl == found.found.divergence.kl <= target
    assert found.found.bytes == model.layout.bytes(200, 1, found.chosen)
    assert set(found.chosen) == set(model.layout.owners)
    if target == 10.0:
        assert set(found.chosen.values()) == {"rot3"}
    for name, one in found.uniform.items():
        assert one.divergence.kl > target or found.found.bytes <= one.bytes, name


def test_what_tune_writes_is_what_the_engine_and_the_plan_load(command: Command, tiny: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "precisions.json", tmp_path / "plot.png"
    result = command("tune", tiny, *SHORT, "--context", 300, "--target-kl", 0.02, "--json", "-o", file, "--plot", plot)
    assert result.status == 0
    written = json.loads(result.out)
    assert written == json.loads(file.read_text())
    assert written["kl"] <= 0.02
    assert [(owner["layer"], owner["readers"]) for owner in written["owners"]] == [(0, []), (1, []), (2, [4]), (3, [5])]
    assert plot.read_bytes().startswith(b"\x89PNG")
    llm = LLM(tiny, kv_dtype=file, max_context=400, progress=False)
    names = {int(layer): name for layer, name in written["kv_dtype"].items()}
    assert len(set(names.values())) > 1, "owners should differ for this test to say anything"
    assert {layer: llm.layout.precision_of(layer, llm.engine.precision).name for layer in range(6)} == {
        layer: names[llm.layout.owner[layer]] for layer in range(6)
    }
    assert written["bytes"] == plan(str(tiny), context=300, kv_dtype=file).kv_bytes["total"] == llm.layout.bytes(300, 1, names)
    output = llm.generate([[10 + i % 200 for i in range(280)]], SamplingParams(max_tokens=11, temperature=0, ignore_eos=True, n=3))[0]
    for completion in output.outputs:
        metrics = completion.metrics
        assert metrics is not None
        assert metrics.planned_bytes == metrics.held_bytes == llm.layout.held_bytes(290, 1, names)
    llm.arena.check_integrity()
    assert llm.arena.num_held == 0


def test_an_interrupted_tuning_leaves_the_best_so_far_and_goes_on_later(tmp_path: Path) -> None:
    model, windows, names = tiny_model.model(), [list(range(3, 60))], ("int8", "int4", "rot3")
    whole = tune(model, windows, 3e-2, names, context=200)
    file = tmp_path / "a" / "journal.jsonl"

    def interrupt(done: int, total: int) -> None:
        if done == 5:  # three precisions of all owners, then an owner alone in two
            raise KeyboardInterrupt

    first = tune(model, windows, 3e-2, names, 200, interrupt, Journal(file))
    assert first.interrupted
    assert (first.owners, first.uniform) == ({}, whole.uniform)
    assert first.found.divergence.kl <= 3e-2
    assert first.found.bytes == model.layout.bytes(200, 1, first.chosen) < first.reference_bytes
    with file.open("a") as torn:
        torn.write('\n["[0, 8, ')
    kept = Journal(file)
    assert len(kept) == 3
    assert tune(model, windows, 3e-2, names, 200, known=kept) == whole
    assert len(Journal(file)) == len(kept) > 3
    kept.forget()
    assert len(Journal(file)) == 0


def test_a_journal_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    journal = Journal(tmp_path / "file" / "journal.jsonl")
    journal["one"] = Sums(0.5, 0.5, 1, 1)
    assert journal["one"].kl == 0.5
    assert str(tmp_path) in journal.failure


def test_a_journal_is_of_one_text_and_of_files_as_they_are(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path))
    paths = [
        journal_for(tiny, [[1, 2, 3]], ["float32"]),
        journal_for(tiny, [[1, 2]], ["float32"]),
        journal_for(tiny, [[1, 2, 3]], ["bfloat16"]),
    ]
    assert len({journal.path for journal in paths}) == 3
    assert journal_for(tiny, [[1, 2, 3]], ["float32"]).path == paths[0].path


def test_owners_with_readers_cost_more_in_the_demo_model(command: Command) -> None:
    """What the documentation says of it: the owners that others read are the dear ones."""
    result = command("tune", "demo", "--tokens", 128, "--window", 128, "--candidates", "int4", "--json")
    cost = {owner["layer"]: owner["alone"]["int4"]["kl"] for owner in json.loads(result.out)["owners"]}
    assert min(cost[3], cost[4]) > max(cost[1], cost[2])


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "int4", "rot2"])
def test_generate_takes_a_precision_and_holds_what_was_planned(command: Command, tiny: Path, kv_dtype: str) -> None:
    words = ("generate", tiny, "In the beginning", "--max-tokens", 40, "--temperature", 0, "--ignore-eos", "--json", "--kv-dtype", kv_dtype)
    found = json.loads(command(*words).out)["kv_bytes"]
    assert found["planned"] == found["held"]
    assert found["total"] == plan(str(tiny), context=16 + 39, kv_dtype=kv_dtype).kv_bytes["total"]


def test_plan_counts_a_file_by_owner(command: Command, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "precisions.json"
    file.write_text('{"kv_dtype": {"1": "int8", "-1": "int4"}}')
    result = command("plan", tiny, "--context", 100, "--kv-dtype", file)
    assert "int8 (1), int4 (3) owners' cache" in result.out
    assert "k, v: 2 x 8 (int8)" in result.out
    report = plan(str(tiny), context=100, kv_dtype=file)
    full, small = 2 * 2 * (8 + 2), 2 * 2 * (4 + 4)
    assert report.kv_bytes["total"] == 100 * (full + small) + 2 * 24 * small
    assert report.without.sharing == 100 * (full + 2 * small) + 3 * 24 * small  # readers as their owners


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "no object 'kv_dtype'"),
        ('{"kv_dtype": {"0": 3}}', "no object 'kv_dtype'"),
        ('{"kv_dtype": {"first": "int8"}}', "layer indices, not 'first'"),
        ('{"kv_dtype": {"4": "int8"}}', "layer 4 owns no cache"),
        ('{"kv_dtype": {"0": "int5"}}', "unknown precision 'int5'"),
        ("{", "is not JSON"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(command: Command, tiny: Path, tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content)
    for verb in (("generate", tiny, "x"), ("plan", tiny)):
        result = command(*verb, "--kv-dtype", file)
        assert (result.status, words in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target-kl", "0"), "must be above 0"),
        (("--candidates", "int8,int5"), "unknown precision 'int5'"),
        (("--candidates", "bf16"), "nothing to choose from"),
        (("--plot", "plot.jpeg"), "must end in .svg or .png"),
        (("-o", "nowhere/there.json"), "the directory nowhere does not exist"),
        (("--text", "missing.txt"), "No such file"),
    ],
)
def test_mistakes_are_one_line(command: Command, tiny: Path, words: tuple[str, ...], message: str) -> None:
    result = command("tune", tiny, *SHORT, *words)
    assert result.status == 2
    assert message in result.err.splitlines()[-1]


def test_a_mapping_by_owner_leaves_the_others_in_the_models_type(tiny: Path) -> None:
    llm = LLM(tiny, kv_dtype={2: "int8"}, max_context=64, progress=False)
    assert describe_precision(llm.engine.precision, llm.layout) == "fp32 (3), int8 (1) owners'"
    with pytest.raises(ConfigError, match="neither a precision"):
        read_precision("int7", llm.layout)

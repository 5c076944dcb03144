"""What `kvshare tune` wrote becomes a table that names the exceptions."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.tunings import markdown


def test_a_table_names_the_owners_that_differ(tmp_path: Path) -> None:
    found = {"target_kl": 0.01, "kl": 0.0094, "same_top": 0.957, "bytes": 357, "reference_bytes": 1000}
    several = {**dict.fromkeys("0123", "rot4+32"), "4": "rot8+32", "5": "bf16"}
    (tmp_path / "b.json").write_text(json.dumps({**found, "kv_dtype": several}))
    (tmp_path / "a.json").write_text(json.dumps({**found, "kv_dtype": {"0": "rot4"}, "interrupted": True}))
    lines = markdown(tmp_path).splitlines()
    assert lines[2] == "| a | 0.01, interrupted | `rot4`: all | 9.4e-03 | 95.7% | 35.7% |"
    assert lines[3] == "| b | 0.01 | `rot4+32`: 4 of 6; `rot8+32`: layers 4; `bf16`: layers 5 | 9.4e-03 | 95.7% | 35.7% |"
    assert f"]({tmp_path.name}/a.svg)" in lines[5]

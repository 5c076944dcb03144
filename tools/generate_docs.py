"""Fills the generated parts of README.md and docs, or checks that they are what the code prints.

    python tools/generate_docs.py [--check]

A generated part stands between two comments:

    <!-- output: kvshare plan gemma-4-E2B -->
    <!-- end -->

What follows `output:` is a key of `GENERATORS`, a command line that begins with `kvshare`, run by this Python, without a network, or the
path of measurements that `benchmarks.compare --json` wrote: they become tables.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100  # columns of a terminal whose output fits the page
PART = re.compile(r"(?P<start><!-- output: (?P<what>.+?) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def command(line: str) -> str:
    """What a `kvshare` command prints, in a fence, under the command. Raises `SystemExit` with its stderr where it fails."""
    environment = {
        **os.environ,
        "COLUMNS": str(WIDTH),
        "NO_COLOR": "1",
        "TERM": "dumb",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    words = [sys.executable, "-m", *shlex.split(line)]
    result = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if result.returncode not in (0, 1):  # 1 is an answer: it does not fit
        raise SystemExit(f"{line}: exit status {result.returncode}\n{result.stderr}")
    printed = "\n".join(row.rstrip() for row in (result.stdout + result.stderr).replace("python -m kvshare", "kvshare").splitlines())
    return f"```console\n$ {line}\n{printed.strip()}\n```\n"


def families() -> dict[str, list[str]]:
    """The `model_type`s that each model class runs, by "module:class"."""
    from kvshare.models import MODELS

    found: dict[str, list[str]] = {}
    for model_type, where in MODELS.items():
        found.setdefault(where, []).append(model_type)
    return found


def _class_of(where: str) -> Any:
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)


def support_table() -> str:
    """For each family that runs: its checkpoints, what it caches, its compact forms, and what of it is not supported."""
    from kvshare.checkpoints.gguf_config import ARCHITECTURES
    from kvshare.layout import KV_FORMS, layout_from_config
    from kvshare.layout.rules import RULES
    from kvshare.planner import bundled_names, resolve

    configs = [resolve(name).config for name in bundled_names()]
    lines = ["| family | `model_type` | checkpoints | caches | compact forms | not supported |", "|---|---|---|---|---|---|"]
    for where, types in families().items():
        own = [config for config in configs if config.get("model_type") in types]
        forms = [form for form in KV_FORMS if any(layout_from_config(c, form).layers != layout_from_config(c).layers for c in own)]
        gguf = "GGUF" if {name.removesuffix("_text") for name in types} & ARCHITECTURES else None
        stores = dict.fromkeys((RULES[name].__doc__ or "").partition("\n")[0].rstrip(".") for name in types)
        checkpoints = ["safetensors", *filter(None, [gguf]), *_class_of(where).released_as]
        cells = (
            f"[{where.split(':')[1]}](../{'src/' + where.split(':')[0].replace('.', '/')}.py)",
            ", ".join(f"`{name}`" for name in types),
            "; ".join(checkpoints),
            "; ".join(stores),
            ", ".join(forms) or "none",
            "; ".join(_class_of(where).unsupported),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def planned_only() -> str:
    """Architectures whose cache is planned but that do not run."""
    from kvshare.layout.rules import RULES
    from kvshare.models import DRAFTERS, MODELS

    return ", ".join(f"`{name}`" for name in sorted(RULES) if name not in MODELS and name not in DRAFTERS) + "\n"


def family_list() -> str:
    """One line for each family that runs."""
    lines = []
    for where, types in families().items():
        title = re.split(r" \(|[:.] ", sys.modules[_class_of(where).__module__].__doc__ or "")[0]
        lines.append(f"* {title} ({', '.join(f'`{name}`' for name in types if not name.endswith('_text'))})")
    return "\n".join(lines) + "\n"


def bundled_configs() -> str:
    """The models whose configs come with kvshare, with the source of each."""
    from kvshare.planner import bundled_names, resolve

    lines = ["| name | repository | source |", "|---|---|---|"]
    lines += [f"| `{name}` | {resolve(name).repository} | {resolve(name).source} |" for name in bundled_names()]
    return "\n".join(lines) + "\n"


def measurements(file: Path) -> str:
    """The tables of one benchmark, or of all those in a directory."""
    from benchmarks.report import markdown

    files = sorted(file.glob("*.json")) if file.is_dir() else [file]
    return "\n".join(markdown(json.loads(each.read_text())) + "\n" for each in files)


def speed() -> str:
    """How kvshare compares with other engines, of all benchmarks that are kept."""
    from benchmarks.highlights import against_others

    return against_others(json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks/results").glob("*.json")))


def tunings() -> str:
    """What `kvshare tune` found for the pretrained models."""
    from benchmarks.tunings import markdown

    return markdown(ROOT / "docs/techniques/tunings")


GENERATORS: Mapping[str, Callable[[], str]] = {
    "support table": support_table,
    "planned only": planned_only,
    "families": family_list,
    "bundled configs": bundled_configs,
    "speed": speed,
    "tunings": tunings,
}
"""Parts that no command prints, by what stands behind `output:`."""


def generated(what: str) -> str:
    """The text of one part. Raises `SystemExit` for one that nothing generates."""
    if what in GENERATORS:
        return GENERATORS[what]()
    if what.endswith((".json", "results")):
        return measurements(ROOT / what)
    if what.split()[0] != "kvshare":
        raise SystemExit(f"nothing generates {what!r}: it is neither one of {', '.join(GENERATORS)} nor a .json file or a kvshare command")
    return command(what)


def fill(text: str) -> str:
    """A page with its generated parts made anew."""
    return PART.sub(lambda part: part["start"] + generated(part["what"]) + part["end"], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a part is not what the code prints")
    check = parser.parse_args().check
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text()
        new = fill(text)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new)
    for name in stale:
        print(f"{name}: {'is not what the code prints; run python tools/generate_docs.py' if check else 'written'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()

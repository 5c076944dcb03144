"""Fills the generated parts of README.md and docs, or checks that they are what the code prints.

    python tools/generate_docs.py [--check]

A generated part stands between two comments:

    <!-- output: kvshare plan gemma-4-E2B -->
    <!-- end -->

What follows `output:` is a key of `GENERATORS`, or a command line that begins with `kvshare`, run by this Python, without a network.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path

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


def support_table() -> str:
    """What each architecture stores, and what of it kvshare plans, runs and reads."""
    from kvshare.checkpoints.gguf_config import ARCHITECTURES
    from kvshare.layout.rules import RULES
    from kvshare.models import MODELS
    from kvshare.planner.parameters import COUNTERS

    def row(model_type: str) -> tuple[str, ...]:
        stores = (RULES[model_type].__doc__ or "").partition("\n")[0].rstrip(".")
        runs = "yes" if model_type in MODELS else "planned only"
        return stores, runs, "yes" if model_type in COUNTERS else "no", "yes" if model_type.removesuffix("_text") in ARCHITECTURES else "no"

    lines = ["| `model_type` | its cache | runs | weights counted | GGUF |", "|---|---|---|---|---|"]
    order = sorted(RULES, key=lambda name: (row(name)[1] != "yes", row(name), name))
    for cells, names in groupby(order, key=row):
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bundled_configs() -> str:
    """The models whose configs come with kvshare, with the source of each."""
    from kvshare.planner import bundled_names, resolve

    lines = ["| name | repository | source |", "|---|---|---|"]
    lines += [f"| `{name}` | {resolve(name).repository} | {resolve(name).source} |" for name in bundled_names()]
    return "\n".join(lines) + "\n"


GENERATORS: Mapping[str, Callable[[], str]] = {"support table": support_table, "bundled configs": bundled_configs}
"""Parts that no command prints, by what stands behind `output:`."""


def generated(what: str) -> str:
    """The text of one part. Raises `SystemExit` for one that nothing generates."""
    if what in GENERATORS:
        return GENERATORS[what]()
    if what.split()[0] != "kvshare":
        raise SystemExit(f"nothing generates {what!r}: it is neither one of {', '.join(GENERATORS)} nor a kvshare command")
    return command(what)


def fill(text: str) -> str:
    """A page with its generated parts made anew."""
    return PART.sub(lambda part: part["start"] + generated(part["what"]) + part["end"], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a part is not what the code prints")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT / "src"))
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

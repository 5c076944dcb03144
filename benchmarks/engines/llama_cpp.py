"""llama.cpp: `llama-batched-bench` reads each prompt and decodes behind it. LLAMA_CPP_BIN names the directory of its programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines import serve
from benchmarks.engines.decodes import ask_bandwidth, chosen

_KV_BUFFER = re.compile(r"KV buffer size\s*=\s*([0-9.]+) MiB")


def run(model: str, points: list[list[int]], decode: int, dtype: str, flash: str) -> Iterator[dict[str, Any]]:
    """The cache is llama.cpp's default of 16-bit floats, whatever `dtype`. Cache bytes are its buffers, sized for the whole context.

    The program reads a prompt and decodes behind it in one go, so the bandwidth can be measured behind its decode steps only.
    """
    program = str(Path(os.environ.get("LLAMA_CPP_BIN", "")) / "llama-batched-bench")
    yield {"ready": True}
    for context, batch in points:
        room = -(-(context + decode + 8) // 256) * 256 * batch
        words = [program, "-m", model, "-t", os.environ["OMP_NUM_THREADS"], "-fa", flash, "-c", str(room), "--output-format", "jsonl"]
        ask_bandwidth()  # of no use before the prompt is read, but the machine may be waited for here
        words += ["-npp", str(context), "-ntg", str(decode), "-npl", str(batch), "-v"]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        after = ask_bandwidth()
        lines = [line[line.index("{") :] for line in (done.stdout + done.stderr).splitlines() if '"t_tg"' in line]
        if not lines:
            raise SystemExit(f"llama-batched-bench measured nothing: {done.stderr.strip()[-300:]}")
        found = json.loads(lines[-1])
        held = round(sum(float(size) for size in _KV_BUFFER.findall(done.stdout + done.stderr)) * 2**20)
        around = chosen([{"decode_s": found["t_tg"] / decode, "before_gb_s": None, "after_gb_s": after}])
        yield {"context": context, "batch": batch, "ttft_s": found["t_pp"], **around, "held_bytes": held or None}


if __name__ == "__main__":
    serve(run)

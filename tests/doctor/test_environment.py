"""What the processor's own list says is what is reported."""

from __future__ import annotations

from pathlib import Path

from kvshare.doctor.environment import instruction_sets


def test_instruction_sets_are_those_of_the_first_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f amx_tile avx512_bf16_not\n\nprocessor\t: 1\nflags\t: fma\n")
    assert instruction_sets(file) == ["avx2", "avx512f", "amx_tile"]
    file.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert instruction_sets(file) == ["asimd", "asimddp", "i8mm"]
    assert instruction_sets(tmp_path / "none") == []

"""What bandwidth is measured with reads every word, in every pattern, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from kvshare.kernels.read_memory import PATTERNS, ReadPattern, read_memory, reference_read_memory


@pytest.mark.parametrize("pattern", [*PATTERNS, ReadPattern(1, 64), ReadPattern(16, 192, 4096)])
def test_every_word_is_read(isa: str, pattern: ReadPattern) -> None:
    blocks = 3 if pattern.run > 1 << 16 else 21
    memory = torch.randint(0, 256, (blocks * pattern.streams * pattern.run,), dtype=torch.uint8)
    assert read_memory(memory, pattern) == reference_read_memory(memory)
    memory[-1] += 1
    assert read_memory(memory, pattern) == reference_read_memory(memory)


@pytest.mark.parametrize("pattern", [ReadPattern(3, 64), ReadPattern(1, 32), ReadPattern(1, 0), ReadPattern(16, 1024)])
def test_a_pattern_that_does_not_divide_the_memory_is_refused(isa: str, pattern: ReadPattern) -> None:
    with pytest.raises(ValueError, match=r"no such pattern|not whole blocks"):
        read_memory(torch.zeros(1024, dtype=torch.uint8), pattern)

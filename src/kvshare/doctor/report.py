"""What an examination found: one `Check` for each property, and the whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "not compared"]


@dataclass(frozen=True, slots=True)
class Check:
    """One property. `measured` and `bound` are numbers of the same kind where the property has a bound."""

    name: str
    dtype: str  # of the weights that ran; "" where none did
    status: Status
    detail: str
    measured: float | None = None
    bound: float | None = None


@dataclass(slots=True)
class Report:
    """All checks of one model."""

    origin: str
    num_tokens: int  # of the text that was run
    perplexity: float | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed; a comparison that could not be made does not fail."""
        return all(check.status != "failed" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.origin,
            "passed": self.passed,
            "num_tokens": self.num_tokens,
            "perplexity": self.perplexity,
            "checks": [asdict(check) for check in self.checks],
        }

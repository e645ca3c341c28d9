"""One figure of `rlflow doctor`, and the bound it was held to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One figure; `passed` is None where there is nothing to pass."""

    name: str
    value: float
    limit: str = ""
    passed: bool | None = None
    detail: str = ""

    @property
    def verdict(self) -> str:
        """PASS, FAIL or INFO."""
        return "INFO" if self.passed is None else "PASS" if self.passed else "FAIL"

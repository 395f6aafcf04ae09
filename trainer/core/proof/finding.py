"""What a check of the proof reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A reason why a run would depend on its hardware."""

    check: str  # "samples", "repeat", "moved", "rebuild", "processes"
    what: str  # one line: which module, tensor or sample parts, by how much
    remedy: str  # one line: what the user does about it

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"

    def to_dict(self) -> dict[str, str]:
        """As `summary.json` holds it."""
        return {"check": self.check, "what": self.what, "remedy": self.remedy}

"""What does one stage of the proof say: which figures, against which bars, and with what outcome?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from slmops.results import Estimate

Status = Literal["pass", "fail", "skipped", "inconclusive"]
NAMES = ("files", "tokenizer", "template", "stop_tokens", "graph", "logits", "text", "retention", "adapters", "self_test")


@dataclass(frozen=True)
class Stage:
    """The outcome of one stage."""

    name: str
    status: Status
    explanation: str
    """One line: what was found; of a failed stage, what is wrong and what to do."""
    figures: dict[str, Any] = field(default_factory=dict)
    bars: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        figures = {key: value.document() if isinstance(value, Estimate) else value for key, value in self.figures.items()}
        return {"name": self.name, "status": self.status, "explanation": self.explanation, "figures": figures, "bars": self.bars}


@dataclass(frozen=True)
class Verdict:
    """The outcome of one figure against its bar."""

    status: Status
    text: str


def at_most(name: str, figure: Estimate, bar: float) -> Verdict:
    """Hold a figure that should be low against its bar, by the bounds of its interval."""
    status: Status = "pass" if figure.high <= bar else "fail" if figure.low > bar else "inconclusive"
    return Verdict(status, f"{name} {figure.value:.3g} [{figure.low:.3g}, {figure.high:.3g}], bar {bar:g}")


def at_least(name: str, figure: Estimate, bar: float) -> Verdict:
    """Hold a figure that should be high against its bar, by the bounds of its interval."""
    status: Status = "pass" if figure.low >= bar else "fail" if figure.high < bar else "inconclusive"
    return Verdict(status, f"{name} {figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}], bar {bar:g}")


def exactly(name: str, value: float, bar: float) -> Verdict:
    """Hold a figure without sampling error (the largest of all differences, say) against its bar."""
    return Verdict("pass" if value <= bar else "fail", f"{name} {value:.3g}, bar {bar:g}")


def within(name: str, value: float, low: float, high: float) -> Verdict:
    """Hold a figure without sampling error against a band around 1."""
    return Verdict("pass" if low <= value <= high else "fail", f"{name} {value:.4g}, bars {low:g} to {high:g}")


def concluded(name: str, verdicts: list[Verdict], figures: dict[str, Any], bars: dict[str, Any], advice: str = "") -> Stage:
    """Make a stage of its verdicts: one that fails fails it, and one that cannot tell leaves it open."""
    for status in ("fail", "inconclusive"):
        concerned = [verdict.text for verdict in verdicts if verdict.status == status]
        if concerned:
            ending = f": {advice}" if advice and status == "fail" else ""
            ending = ending or (" (too few rows to tell: give more with --data)" if status == "inconclusive" else "")
            return Stage(name, status, "; ".join(concerned) + ending, figures, bars)
    return Stage(name, "pass", "; ".join(verdict.text for verdict in verdicts), figures, bars)

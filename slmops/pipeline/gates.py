"""When does a step fail the pipeline although it ran? When a figure of its document misses a bar of its `gate`.

`gate: {exact_match: 0.95}` wants at least 0.95; of a figure that is better when smaller (a loss, a perplexity, a size, a
time) at most. `">= 0.95"` and `"<= 12"` say it outright. `ratio.decode` and the like reach any figure of the document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmops.errors import InvalidInput
from slmops.pipeline.outcome import value_of

_BAR = re.compile(r"^(>=|<=)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)$")
_BETTER_SMALLER = ("perplexity", "loss", "kl", "nmse", "_seconds", "_ms", "_bytes", "bytes_per_parameter")


@dataclass(frozen=True)
class Bar:
    """One figure and the bar that it must meet."""

    figure: str
    at_least: bool
    value: float

    def __str__(self) -> str:
        return f"{self.figure} {'>=' if self.at_least else '<='} {self.value:g}"


def parse_bar(figure: str, value: Any) -> Bar:
    """Read one entry of a gate.

    Raises:
        InvalidInput: neither a number nor a text such as ">= 0.95".
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        smaller = any(part.endswith(_BETTER_SMALLER) for part in figure.split("."))
        return Bar(figure, not smaller, float(value))
    matched = _BAR.match(value.strip()) if isinstance(value, str) else None
    if matched is None:
        raise InvalidInput(f'{value!r} is no bar: give a number, or a text such as ">= 0.95"')
    return Bar(figure, matched[1] == ">=", float(matched[2]))


def missed(bars: tuple[Bar, ...], document: Mapping[str, Any]) -> list[str]:
    """Return `figure is X, and the gate is Y` for each bar that a document does not meet; not a number meets none.

    Raises:
        InvalidInput: the document has no such figure.
    """
    problems = []
    for bar in bars:
        found = _figure(document, bar.figure)
        if found is None:
            measured = ", ".join(document.get("metrics") or {}) or ", ".join(document)
            raise InvalidInput(f"gate: there is no figure {bar.figure}", f"these were measured: {measured}")
        if not (found >= bar.value if bar.at_least else found <= bar.value):
            problems.append(f"{bar.figure} is {found:.6g}, and the gate is {bar}")
    return problems


def _figure(document: Mapping[str, Any], name: str) -> float | None:
    for place in (f"metrics.{name}", name):
        found = value_of(document, place)
        if isinstance(found, (int, float)):
            return float(found)
    return None

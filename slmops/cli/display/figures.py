"""How is a figure written for people? Sizes, times, counts and estimates; a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NONE = "-"


def number(value: Any, digits: int = 4) -> str:
    """Return a number with `digits` significant ones: 0.0312, 1,234."""
    if isinstance(value, Mapping):
        return estimate(value, digits)
    if value is None or isinstance(value, str):
        return value or NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(number(item, digits) for item in value) or NONE
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float) or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def estimate(value: Mapping[str, Any] | None, digits: int = 4) -> str:
    """Return `0.9557 [0.9377, 0.9687]`, or the bare value where there is no interval."""
    if not value:
        return NONE
    if "value" not in value:
        return spread(value, digits) if "median" in value else ", ".join(f"{key} {number(item, digits)}" for key, item in value.items())
    low, high = value.get("low"), value.get("high")
    if low is None or high is None:
        return number(value["value"], digits)
    return f"{number(value['value'], digits)} [{number(low, digits)}, {number(high, digits)}]"


def spread(value: Any, digits: int = 3) -> str:
    """Return `12.3 (11.9 to 13.1)`: median, and 5th to 95th percentile."""
    if not isinstance(value, Mapping):
        return number(value, digits)
    if "median" not in value:
        return estimate(value, digits)
    middle = number(value["median"], digits)
    if value.get("p5") is None or value.get("p95") is None:
        return middle
    return f"{middle} ({number(value['p5'], digits)} to {number(value['p95'], digits)})"


def size(count: Any) -> str:
    """Return a size in bytes as `1.7 GB` (powers of ten, as disks are sold)."""
    if isinstance(count, Mapping):
        count = count.get("value", count.get("median"))
    if not isinstance(count, (int, float)) or isinstance(count, bool) or not math.isfinite(count):
        return NONE
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: Any) -> str:
    """Return a time in seconds as `3 min 05 s`, `31.2 s` or `12 ms`."""
    if isinstance(seconds, Mapping):
        seconds = seconds.get("median", seconds.get("value"))
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not math.isfinite(seconds):
        return NONE
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def share(value: Any) -> str:
    """Return a share as a percentage: 0.42 -> `42 %`."""
    if isinstance(value, Mapping):
        value = value.get("value", value.get("median"))
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return NONE
    return f"{100 * value:.3g} %"

"""What does a set of measured values say, and how sure is it?

Every figure that slmops reports is one of these: an estimate with a 95 % interval and its n, or the spread of repeated
timings. Pure arithmetic, seeded: the same values give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; `n` is the number of independent observations behind it."""

    value: float
    low: float
    high: float
    n: int
    unit: str = ""

    def document(self) -> dict[str, Any]:
        """Return the JSON form: value, low, high, n, and the unit where there is one."""
        return {key: value for key, value in asdict(self).items() if value != ""}

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{' ' + self.unit if self.unit else ''} (n={self.n})"


@dataclass(frozen=True)
class Spread:
    """Repeated timings of one thing: median and the 5th and 95th percentile, with the raw values."""

    median: float
    p5: float
    p95: float
    samples: tuple[float, ...]

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"median": self.median, "p5": self.p5, "p95": self.p95, "samples": list(self.samples)}


def proportion(successes: int, n: int) -> Estimate:
    """Estimate a proportion with Wilson's score interval (Wilson 1927, JASA 22), right at 0 and 1 and for small n."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def mean(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """Estimate a (weighted) mean with a percentile bootstrap over the values (Efron 1979).

    Give one value a row, with the row's token count as its weight, where tokens of a row are not independent.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    weight = np.ones_like(data) if weights is None else np.asarray(weights, dtype=np.float64)
    value = float((data * weight).sum() / weight.sum())
    if data.size == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    random = np.random.default_rng(seed)
    resampled = np.empty(_RESAMPLES)
    for start in range(0, _RESAMPLES, 100):  # by hundreds: bounded memory for many rows
        rows = random.integers(0, data.size, size=(100, data.size))
        resampled[start : start + 100] = (data[rows] * weight[rows]).sum(1) / weight[rows].sum(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high), int(data.size))


def paired_difference(candidate: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Estimate the mean of candidate - baseline over the same rows, in their order.

    Where no row differs, the interval still has the width that n allows: the rule of three (Hanley and
    Lippman-Hand 1983) bounds what was never seen in n rows by 3 / n.
    """
    import numpy as np

    differences = np.asarray(candidate, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    if differences.size and not differences.any():
        bound = 3.0 / differences.size
        return Estimate(0.0, -bound, bound, int(differences.size))
    return mean(differences.tolist())


def spread(samples: Sequence[float]) -> Spread:
    """Return median, 5th and 95th percentile of repeated timings."""
    import numpy as np

    p5, median, p95 = (float(x) for x in np.percentile(np.asarray(samples, dtype=np.float64), [5, 50, 95]))
    return Spread(median, p5, p95, tuple(float(x) for x in samples))


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Estimate:
    """Estimate the ratio of two alternating series, round by round: the median of the rounds' ratios, bootstrapped.

    Round i of both was measured next to each other, so the drift of the machine cancels within a round.
    """
    import numpy as np

    ratios = np.asarray(numerators, dtype=np.float64) / np.asarray(denominators, dtype=np.float64)
    if ratios.size == 1:
        return Estimate(float(ratios[0]), float(ratios[0]), float(ratios[0]), 1)
    random = np.random.default_rng(seed)
    medians = np.median(ratios[random.integers(0, ratios.size, size=(_RESAMPLES, ratios.size))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Estimate(float(np.median(ratios)), float(low), float(high), int(ratios.size))


def divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Return KL(reference || candidate) in nats of each row of logits, in float64 (Kullback and Leibler 1951)."""
    import numpy as np

    p, q = log_softmax(reference), log_softmax(candidate)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log probabilities, float64."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

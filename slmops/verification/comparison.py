"""How far are two models' logits apart, on the same tokens?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from slmops import progress, results
from slmops.data import NOT_COUNTED, Encoded
from slmops.results import Estimate
from slmops.runtime.runner import Runner


@dataclass
class Comparison:
    """Differences between a reference and a candidate, summed row by row over the supervised tokens."""

    tie: float = 0.0
    """Logits nearer than this are a tie."""
    tokens: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    """Mean KL(reference || candidate) of each row's tokens, nats."""
    same_top: int = 0
    ties: int = 0
    """Tokens with another most likely token where the reference's two logits are a tie."""
    squared_error: float = 0.0
    squared_logits: float = 0.0
    largest: float = 0.0

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Add one row: logits (tokens, vocabulary) of both, at positions that predict supervised tokens."""
        self.tokens.append(len(reference))
        self.kl.append(float(results.divergence(reference, candidate).mean()))
        ours, theirs = reference.argmax(-1), candidate.argmax(-1)
        rows = np.arange(len(reference))
        margin = reference[rows, ours] - reference[rows, theirs]
        self.same_top += int((ours == theirs).sum())
        self.ties += int(((ours != theirs) & (margin <= self.tie)).sum())
        difference = candidate.astype(np.float64) - reference
        self.squared_error += float((difference**2).sum())
        self.squared_logits += float((reference.astype(np.float64) ** 2).sum())
        self.largest = max(self.largest, float(np.abs(difference).max()))

    @property
    def mean_kl(self) -> Estimate:
        """Mean KL divergence in nats a token; the interval is a bootstrap over rows."""
        estimate = results.mean(self.kl, self.tokens)
        return Estimate(estimate.value, estimate.low, estimate.high, estimate.n, "nats")

    @property
    def top1(self) -> Estimate:
        """Share of tokens with the same most likely token."""
        return results.proportion(self.same_top, sum(self.tokens))

    @property
    def nmse(self) -> float:
        """Normalized mean square error of the logits: sum of squared differences over sum of squared reference logits."""
        return self.squared_error / self.squared_logits if self.squared_logits else math.nan


def supervised(sequence: Encoded) -> np.ndarray:
    """Return the positions whose logits predict a supervised token."""
    return np.flatnonzero(np.asarray(sequence.labels[1:]) != NOT_COUNTED)


def compare(reference: Runner, candidate: Runner, sequences: Sequence[Encoded], *, label: str, tie: float = 0.0) -> Comparison:
    """Run two models over the same sequences, teacher-forced, and compare their logits at the supervised tokens.

    Args:
        reference: the one that is right.
        candidate: the one that is held against it.
        sequences: sorted by length, so that neither runner has to hold rows back.
        label: for the progress.
        tie: logits of the reference nearer than this are a tie.
    """
    comparison = Comparison(tie=tie)
    ids = [sequence.ids for sequence in sequences]
    with progress.task(label, total=len(sequences), unit="rows") as task:
        for sequence, ours, theirs in zip(sequences, reference.logits(ids), candidate.logits(ids), strict=True):
            positions = supervised(sequence)
            if len(positions):
                comparison.add(ours[positions], theirs[positions])
            task.advance()
    return comparison

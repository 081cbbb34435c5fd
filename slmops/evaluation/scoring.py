"""How good are the answers, and how sure is that? Exact match, accuracy and macro-F1, each with a 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slmops import results
from slmops.errors import InvalidInput
from slmops.evaluation.answering import Answer
from slmops.results import Estimate

_RESAMPLES = 2000


def score(answers: Sequence[Answer], metric: str) -> Estimate:
    """Estimate a metric over answered rows.

    Args:
        answers: one a row.
        metric: `exact_match` (both sides stripped), `accuracy` (an answer outside the labels is wrong), or `f1`: the
            unweighted mean over the labels of each one's F1. The labels are the distinct expected texts.

    Returns:
        The estimate: Wilson's interval for shares, a bootstrap over rows for F1.

    Raises:
        InvalidInput: no such metric of answers.
    """
    if metric == "exact_match":
        return results.proportion(sum(answer.correct for answer in answers), len(answers))
    if metric == "accuracy":
        labels = set(labels_of(answers))
        right = sum(answer.predicted.strip() in labels and answer.correct for answer in answers)
        return results.proportion(right, len(answers))
    if metric == "f1":
        return _macro_f1(answers)
    raise InvalidInput(f"metric {metric}: answers are scored by exact_match, accuracy or f1", "choose one of them with --metric")


def labels_of(answers: Sequence[Answer]) -> list[str]:
    """Return the distinct expected texts, stripped and sorted."""
    return sorted({answer.expected.strip() for answer in answers})


def _macro_f1(answers: Sequence[Answer], seed: int = 0) -> Estimate:
    labels = labels_of(answers)
    number = {label: i for i, label in enumerate(labels)}
    expected = np.array([number[answer.expected.strip()] for answer in answers], np.int64)
    predicted = np.array([number.get(answer.predicted.strip(), len(labels)) for answer in answers], np.int64)
    value = _f1(expected, predicted, len(labels))
    random = np.random.default_rng(seed)
    resampled = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        rows = random.integers(0, len(expected), size=len(expected))
        resampled[i] = _f1(expected[rows], predicted[rows], len(labels))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(answers))


def _f1(expected: np.ndarray, predicted: np.ndarray, labels: int) -> float:
    """Return macro-F1 = mean over labels of 2 TP / (expected + predicted); labels that are in neither are left out.

    Args:
        expected: (rows,) label numbers.
        predicted: (rows,) label numbers; `labels` stands for an answer outside them.
        labels: how many there are.
    """
    right = np.bincount(expected[expected == predicted], minlength=labels)
    both = np.bincount(expected, minlength=labels) + np.bincount(predicted, minlength=labels + 1)[:labels]
    present = both > 0  # of a resample: it may miss a label
    return float((2 * right[present] / both[present]).mean())

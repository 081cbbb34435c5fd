"""Intervals against figures from the literature and from closed forms."""

from __future__ import annotations

import math
import random

import pytest

from slmops import results


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_proportion_gives_wilsons_interval(successes: int, n: int, low: float, high: float):
    estimate = results.proportion(successes, n)
    assert estimate.value == pytest.approx(successes / n)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=6e-5)
    assert estimate.n == n


def test_proportion_of_nothing_says_nothing():
    estimate = results.proportion(0, 0)
    assert math.isnan(estimate.value)
    assert (estimate.low, estimate.high, estimate.n) == (0.0, 1.0, 0)


def test_mean_agrees_with_the_normal_interval_and_is_seeded():
    values = [random.Random(0).gauss(5.0, 2.0) for _ in range(1)] + [5 + 2 * random.Random(i).gauss(0, 1) for i in range(1, 1000)]
    estimate = results.mean(values)
    average = sum(values) / len(values)
    deviation = math.sqrt(sum((v - average) ** 2 for v in values) / (len(values) - 1))
    half = 1.96 * deviation / math.sqrt(len(values))
    assert estimate.value == pytest.approx(average)
    assert estimate.low == pytest.approx(average - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(average + half, abs=0.15 * half)
    assert estimate == results.mean(values)
    assert estimate != results.mean(values, seed=1)


def test_a_weighted_mean_counts_tokens_and_not_rows():
    assert results.mean([1.0, 3.0], weights=[3, 1]).value == pytest.approx(1.5)


def test_one_value_has_no_interval():
    estimate = results.mean([2.0])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, -math.inf, math.inf)
    assert results.mean([]).n == 0


def test_paired_difference_is_narrower_than_what_rows_vary_by():
    rows = [random.Random(i).gauss(0, 10) for i in range(300)]
    estimate = results.paired_difference([row + 1 for row in rows], rows)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1.0, 1.0, 1.0))


def test_no_difference_in_n_rows_is_bounded_by_three_over_n():
    estimate = results.paired_difference([1.0] * 100, [1.0] * 100)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.0, -0.03, 0.03, 100)


def test_spread_is_median_and_percentiles():
    spread = results.spread([float(x) for x in range(101)])
    assert (spread.median, spread.p5, spread.p95) == (50.0, 5.0, 95.0)
    assert len(spread.document()["samples"]) == 101


def test_ratio_cancels_the_drift_of_the_machine():
    drift = [1.0, 0.5, 2.0, 0.7, 1.3, 0.9, 1.1]
    estimate = results.ratio([20 * d for d in drift], [10 * d for d in drift])
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (2.0, 2.0, 2.0, 7)


def test_ratio_of_one_round_is_a_point():
    assert results.ratio([3.0], [2.0]).document() == {"value": 1.5, "low": 1.5, "high": 1.5, "n": 1}


def test_an_estimate_speaks():
    assert str(results.proportion(1, 2)) == "0.5 [0.09453, 0.9055] (n=2)"

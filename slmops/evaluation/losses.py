"""How surprised is a model by the right answers? Teacher-forced loss of each row, and perplexity over rows.

The tokens that count are those that training counts, the stop token among them. A row's logits are used and dropped
before the next row's come: with a vocabulary of 50,000, 100 tokens of them are 20 MB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slmops import progress, results
from slmops.data import NOT_COUNTED, Corpus, Encoded
from slmops.errors import RunFailed
from slmops.results import Estimate
from slmops.runtime.loading import Loaded
from slmops.runtime.runner import Runner

_ROWS_AT_ONCE = 64
_POSITIONS_AT_ONCE = 64  # of logits that are copied in float32: 64 x 50,000 x 4 bytes = 13 MB


@dataclass(frozen=True)
class RowLoss:
    """The loss of one sequence: its sum over the tokens that count, in nats, and their number."""

    nats: float
    tokens: int


def token_losses(source: Loaded | Runner, corpus: Corpus | Sequence[Encoded]) -> list[RowLoss]:
    """Return the loss of every sequence, in order.

    Args:
        source: a loaded model, or its runner.
        corpus: of `encode_rows`, or its sequences.

    Raises:
        RunFailed: the model gives logits that are not finite.
        InvalidInput: a sequence is longer than the engine takes.
    """
    runner = source.runner if isinstance(source, Loaded) else source
    sequences = corpus.sequences if isinstance(corpus, Corpus) else list(corpus)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))  # equal lengths run together
    losses = [RowLoss(0.0, 0)] * len(sequences)
    with progress.task("perplexity", total=len(sequences), unit="rows") as task:
        for i, logits in _logits(runner, sequences, order):
            losses[i] = _row_loss(logits, sequences[i].labels, runner)
            task.advance()
    return losses


def perplexity(losses: Sequence[RowLoss]) -> Estimate:
    """Estimate perplexity: exp of the mean nats a counted token, with a bootstrap over rows."""
    counted = [loss for loss in losses if loss.tokens]
    nats = results.mean([loss.nats / loss.tokens for loss in counted], weights=[loss.tokens for loss in counted])
    return replace(nats, value=_exp(nats.value), low=_exp(nats.low), high=_exp(nats.high))


def _logits(runner: Runner, sequences: Sequence[Encoded], order: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, logits) of the sequences, some at a time: a runner may hold what it has not yet given."""
    for start in range(0, len(order), _ROWS_AT_ONCE):
        some = order[start : start + _ROWS_AT_ONCE]
        yield from zip(some, runner.logits([sequences[i].ids for i in some]), strict=True)


def _row_loss(logits: np.ndarray, labels: Sequence[int], runner: Runner) -> RowLoss:
    """Sum the loss of one sequence; `logits` is (tokens, vocabulary), row t predicts labels[t + 1]."""
    target = np.asarray(labels[1:])
    positions = np.flatnonzero(target != NOT_COUNTED)
    nats = 0.0
    for start in range(0, len(positions), _POSITIONS_AT_ONCE):
        some = positions[start : start + _POSITIONS_AT_ONCE]
        nats += float(surprise(logits[some], target[some]).sum())
    if not math.isfinite(nats):
        raise RunFailed(f"{runner.folder} gives logits that are not finite", "its weights are damaged, or its training diverged")
    return RowLoss(nats, len(positions))


def surprise(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return -log softmax(logits)[token] of each row in nats, float64.

    Args:
        logits: (rows, vocabulary) float32.
        tokens: (rows,) ids.
    """
    highest = logits.max(-1, keepdims=True)
    total = np.exp(logits - highest).sum(-1, dtype=np.float64)
    chosen = np.take_along_axis(logits, tokens[:, None], -1)
    return np.log(total) - (chosen - highest)[:, 0].astype(np.float64)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

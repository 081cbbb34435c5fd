"""What does every engine give back, and what do both reckon alike?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slmops.config import FinetuneSettings
from slmops.data import Corpus
from slmops.errors import RunFailed

if TYPE_CHECKING:
    from slmops.training.trainer import Row


@dataclass(frozen=True)
class Run:
    """What a trainer, whichever engine it is, reports back."""

    train_loss: float
    validation_loss: float | None
    loop_seconds: float
    steps: int
    history: list[dict[str, Any]]
    trainable_parameters: int
    peak_memory_bytes: int
    estimate: dict[str, Any] | None = None
    """What was foretold, beside what came (`Estimate.document`)."""
    step: dict[str, Any] = field(default_factory=dict)
    """How it was computed (`Step.document`); empty: by another trainer."""


def total_steps(settings: FinetuneSettings, rows: int) -> int:
    """Return the number of optimizer steps of a run."""
    optimizer = settings.optimizer
    per_epoch = math.ceil(math.ceil(rows / optimizer.batch_size) / optimizer.gradient_accumulation)
    return optimizer.max_steps or max(1, round(per_epoch * optimizer.epochs))


def pairs_of(corpus: Corpus) -> list[Row]:
    """Return (ids, labels) of each row."""
    return [(list(sequence.ids), list(sequence.labels)) for sequence in corpus.sequences]


def last_train_loss(history: list[dict[str, Any]]) -> float:
    """Return the mean training loss of the last twentieth of a run.

    Raises:
        RunFailed: there is none.
    """
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not losses:
        raise RunFailed("training made no step", "give more rows or more epochs")
    tail = losses[-max(1, len(losses) // 20) :]
    return float(sum(tail) / len(tail))

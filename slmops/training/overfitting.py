"""Does a run still learn what carries over to new rows? Told from its history alone, so that a resumed run is told the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Few held-out rows make a noisy loss: one evaluation above the lowest says nothing, nor does one percent.
_EVALUATIONS, _MARGIN = 2, 0.01


@dataclass(frozen=True)
class Turn:
    """The validation loss rose while the training loss fell: what the model learns from there on is its rows by heart."""

    step: int
    """Optimizer step of the lowest validation loss."""
    lowest: float
    latest_step: int
    latest: float
    """Validation loss at `latest_step`."""
    train_before: float
    """Mean training loss over the same number of steps before the turn, and after it."""
    train_after: float

    def __str__(self) -> str:
        return (
            f"overfitting: the validation loss turned at step {self.step} ({self.lowest:.4g}, then {self.latest:.4g} at step {self.latest_step}) "
            f"while the training loss fell from {self.train_before:.4g} to {self.train_after:.4g}"
        )

    def document(self) -> dict[str, Any]:
        """Return the turn as a manifest records it."""
        return {"step": self.step, "lowest": self.lowest, "latest_step": self.latest_step, "latest": self.latest}


def find_turn(history: Sequence[dict[str, Any]]) -> Turn | None:
    """Return where the validation loss turned, seen from the latest evaluation; None where it did not.

    Args:
        history: of a Trainer (`state.log_history`).
    """
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if evaluations_since_best(history) < _EVALUATIONS:
        return None
    step, lowest = min(evaluated, key=lambda point: point[1])
    latest_step, latest = evaluated[-1]
    if min(loss for _, loss in evaluated[-_EVALUATIONS:]) <= lowest * (1 + _MARGIN):
        return None
    span = latest_step - step
    before, after = _mean_loss(history, step - span, step), _mean_loss(history, step, latest_step)
    if before is None or after is None or after >= before:
        return None
    return Turn(step, lowest, latest_step, latest, before, after)


def evaluations_since_best(history: Sequence[dict[str, Any]]) -> int:
    """Return how many evaluations have passed since the one with the lowest validation loss."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def _mean_loss(history: Sequence[dict[str, Any]], after: int, until: int) -> float | None:
    losses = [entry["loss"] for entry in history if "loss" in entry and after < entry["step"] <= until]
    return sum(losses) / len(losses) if losses else None

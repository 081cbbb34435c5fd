"""What is done with a run's figures while it goes on? Use of the machine is added, trackers are told, and the run is ended in time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slmops import progress
from slmops.training.curve import point_of
from slmops.training.overfitting import evaluations_since_best, find_turn
from slmops.training.tracking import Tracker
from slmops.training.usage import Meter


class Observer(TrainerCallback):
    """Adds what the machine gave to each entry of the history, and passes the entry on.

    Args:
        trackers: that are told each point, and when the run is over.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers
        self.meter = Meter()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the newest entry; what is logged at the very end is no point of a curve."""
        entry = state.log_history[-1]
        if "loss" in entry or "eval_loss" in entry:
            entry.update(self.meter.read())
            for tracker in self.trackers:
                tracker.log(point_of(entry), state.global_step)


class Patience(TrainerCallback):
    """Names overfitting as soon as it shows, and ends the run when the validation loss has not fallen for long enough.

    Args:
        evaluations: in a row without a new lowest loss that end the run; None: never.
    """

    def __init__(self, evaluations: int | None) -> None:
        self.evaluations = evaluations
        self.told = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A run that goes on has said before what its history shows."""
        self.told = find_turn(state.log_history) is not None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the history, the newest evaluation last."""
        turn = find_turn(state.log_history)
        if turn is not None and not self.told:
            progress.say(str(turn))
        self.told = turn is not None
        since = evaluations_since_best(state.log_history)
        if self.evaluations is not None and since >= self.evaluations and state.global_step < state.max_steps:
            progress.say(f"ended at step {state.global_step}: {since} evaluations without a lower validation loss")
            control.should_training_stop = True


class Seldom(TrainerCallback):
    """Leaves out checkpoints that nobody asked for while little would be lost without them.

    Args:
        seconds: since the beginning or the last checkpoint, before which none is written.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count from here."""
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take back what the Trainer has decided just before."""
        if control.should_save and time.monotonic() - self.last < self.seconds:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count from here."""
        self.last = time.monotonic()

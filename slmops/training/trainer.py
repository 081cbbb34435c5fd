"""What does one training step compute?

A `transformers.Trainer`, so that schedules, callbacks and `accelerate launch` come with it. Four things are ours:
checkpoints (`slmops.training.resuming`), the order of batches (`slmops.training.batches`), what is computed for one
(`slmops.training.step`), and a validation loss weighted by token that keeps the best adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slmops import progress
from slmops.errors import RunFailed
from slmops.training import processes
from slmops.training.batches import IGNORED, Batches
from slmops.training.resuming import ResumableTrainer
from slmops.training.step import Layout, Padded, Step, prepare_step
from slmops.training.step.kernels import why_not_compiled

Row = tuple[list[int], list[int]]


class Rows(Dataset):
    """Rows as (ids, labels)."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return processes.row_of(self.rows, index, IGNORED)


class EpochBatches:
    """A batch sampler for `DataLoader` that shuffles anew each epoch; transformers and accelerate call `set_epoch`."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.batch_size = batches.batch_size
        self.drop_last = False
        self.number = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.number = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches.epoch(self.number)


class SupervisedTrainer(ResumableTrainer):
    """Trains on supervised tokens; see the module's docstring.

    Args:
        model: a causal language model, wrapped by PEFT or not.
        args: the Trainer's own arguments.
        train_rows: (ids, labels) of each training row.
        validation_rows: the same for validation; may be empty.
        seed: of the order of batches.
        step: how batches reach the model, and what of it was made fast.
        keep: called with the model whenever the validation loss is the lowest so far.
        order: batches of row numbers (`Batches`, or a `Mixture`); None: every row once an epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_rows: list[Row],
        validation_rows: list[Row],
        seed: int,
        step: Step,
        keep: Any,
        order: Any = None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=Rows(train_rows), eval_dataset=Rows(validation_rows))  # type: ignore[arg-type]
        self.validation_rows = validation_rows
        self.order = order or Batches([len(ids) for ids, _ in train_rows], args.per_device_train_batch_size, seed)
        self.keep = keep
        self.best_loss = math.inf
        self.trained = [p for p in model.parameters() if p.requires_grad]
        spare_traversals(model, self.trained)
        self.prepared, self.layout = step, step.layout

    def get_train_dataloader(self) -> DataLoader:
        """Return the length-grouped batches; with several processes, this one's share of each."""
        batches: Any = processes.share(EpochBatches(self.order), self.accelerator)
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.layout.collate)  # type: ignore[arg-type]
        return processes.prepare_loader(loader, self.accelerator)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        """Count what the loss of an optimizer step is the mean over, in its accumulated batches and all processes."""
        count = sum(map(self.counted, batch_samples))
        if self.accelerator.num_processes > 1:
            count = int(self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum"))  # type: ignore[arg-type]
        return count

    def counted(self, batch: Any) -> int:
        """Count the supervised tokens of a batch."""
        return int((batch["targets"] != IGNORED).sum())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the summed cross entropy of the supervised tokens over their number in the whole optimizer step."""
        count = num_items_in_batch if num_items_in_batch is not None else self.counted(inputs)
        loss = self.layout.summed_loss(model, inputs) / count
        # Gradients of processes are averaged afterwards, and the count is that of all of them.
        return loss * self.accelerator.num_processes

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: nobody reads the count, and transformers goes through all modules for it at each step."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the validation loss; keep the adapter if it is the best so far."""
        if not self.validation_rows:
            return {}
        metrics = self.measure()
        if metrics["eval_loss"] < self.best_loss:
            self.best_loss = metrics["eval_loss"]
            self.keep(self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict[str, float]:
        """Return the validation loss, in nats a supervised token, as `eval_loss`."""
        return {"eval_loss": self.shared_validation_loss(self.validation_rows)}

    def shared_validation_loss(self, rows: list[Row]) -> float:
        """Return the mean loss over all rows, of which each process computes its share."""
        model: Any = self.model
        batch_size = 4 * self.args.per_device_train_batch_size
        count, index = self.accelerator.num_processes, self.accelerator.process_index
        if count == 1 or self.sharded:  # sharded, every process has to take part in every batch
            return validation_loss(model, rows, batch_size, self.layout)
        own = rows[index::count]
        loss = validation_loss(model, own, batch_size, self.layout) if own else 0.0
        return processes.mean_over(self.accelerator, loss, sum(label != IGNORED for _, labels in own for label in labels[1:]))


def step_of(model: nn.Module, rows: list[Row], device: torch.device, *, int8: bool = False) -> Step:
    """Return how a model is trained, which is made fast where every process has all weights; say what could not be.

    Args:
        model: see `slmops.training.step.prepare_step`.
        rows: of the training data.
        device: where it is trained; the step is made for it.
        int8: see there.
    """
    if processes.sharded():
        return Step(Padded(model))
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    step = prepare_step(model, rows, int8=int8)
    if step.reason is not None:
        progress.say(f"rows are padded, not joined: {step.reason}")
    missing = why_not_compiled() if device.type == "cpu" else None
    if missing is not None:
        progress.say(f"a step takes longer than it could, as PyTorch's operators alone compute it: {missing}")
    if step.in_int8 is not None:
        progress.say(f"{step.in_int8[0]} of {step.in_int8[1]} frozen matrices are multiplied in int8")
    return step


def spare_traversals(model: Any, trained: list[nn.Parameter]) -> None:
    """Let a model answer `train` and `zero_grad`, which the Trainer calls at every step, without going through all modules.

    On a small model the two take 15 % of a step.
    """
    own = model.train

    def train(mode: bool = True) -> Any:
        return own(mode) if model.training != mode else model

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    model.train, model.zero_grad = train, zero_grad


def validation_loss(model: nn.Module, rows: list[Row], batch_size: int, layout: Layout | None = None) -> float:
    """Return the mean cross entropy, in nats a supervised token, over all rows; the model is left in train mode."""
    model.eval()
    layout = layout or Padded(model)
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for numbers in Batches([len(ids) for ids, _ in rows], batch_size, 0).epoch(0):
            made = layout.collate([rows[i] for i in numbers])
            batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in made.items()}
            total += float(layout.summed_loss(model, batch))
            tokens += int((batch["targets"] != IGNORED).sum())
    model.train()
    return total / tokens


class Watcher(TrainerCallback):
    """Shows each step, stops a run that diverges, and times the loop."""

    def __init__(self, task: progress.Task, tokens_per_step: float) -> None:
        self.task, self.tokens_per_step = task, tokens_per_step
        self.started = time.perf_counter()
        self.steps = 0
        self.fields: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step."""
        self.steps += 1
        speed = self.steps * self.tokens_per_step / (time.perf_counter() - self.started)
        self.task.advance(1, **self.fields, tokens_per_second=round(speed))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the newest losses; raise RunFailed when one is not a number."""
        logs = kwargs.get("logs") or {}
        for ours, theirs in (("loss", "loss"), ("validation_loss", "eval_loss")):
            if theirs in logs:
                self.fields[ours] = round(float(logs[theirs]), 4)
                if not math.isfinite(float(logs[theirs])):
                    raise RunFailed(
                        f"training diverged: {ours} is {logs[theirs]} at step {state.global_step}",
                        "lower --learning-rate, or check the data",
                    )

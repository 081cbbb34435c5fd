"""How does a run train with a loss of the user's own? Rows padded on the right, their columns beside them, the loss called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from slmops.data import NOT_COUNTED, Encoded, Row
from slmops.training import processes
from slmops.training.objectives.material import Setup
from slmops.training.objectives.own_loss import LossBatch, OwnLoss
from slmops.training.step import Padded, Step
from slmops.training.trainer import EpochBatches, SupervisedTrainer

LossRow = tuple[Encoded, Row]


class OwnLossTrainer(SupervisedTrainer):
    """A `SupervisedTrainer` whose loss is the user's; an optimizer step takes the mean over its rows, those of all processes.

    Args:
        setup: of the run.
        train: training rows, each with its columns.
        validation: the same for validation; may be empty.
        loss: see `slmops.training.objectives.own_loss`.
        seed: of the order of batches.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, setup: Setup, train: Sequence[LossRow], validation: Sequence[LossRow], loss: OwnLoss, seed: int) -> None:
        learned, held_out = ([(list(sequence.ids), list(sequence.labels)) for sequence, _ in rows] for rows in (train, validation))
        super().__init__(
            setup.model, setup.arguments, learned, held_out, seed, Step(Padded(setup.model)), setup.keep, order=setup.course.order
        )
        self.loss, self.own_rows, self.held_out = loss, _Rows(train), list(validation)

    def get_train_dataloader(self) -> DataLoader:
        """Return the length-grouped batches, as the loss is given them."""
        batches: Any = processes.share(EpochBatches(self.order), self.accelerator)
        loader = DataLoader(self.own_rows, batch_sampler=batches, collate_fn=_collate)  # type: ignore[arg-type]
        return processes.prepare_loader(loader, self.accelerator)

    def counted(self, batch: Any) -> int:
        """Count the rows of a batch."""
        return int(batch["counted"])

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the user's loss, weighted by the batch's share of the optimizer step's rows."""
        batch = dict(inputs)
        counted = batch.pop("counted")
        share = counted / (num_items_in_batch or counted or 1)
        # Gradients of processes are averaged afterwards, and the rows are those of all of them.
        return self.loss(model, batch) * (share * self.accelerator.num_processes)  # type: ignore[arg-type]

    def measure(self) -> dict[str, float]:
        """Return the mean of the user's loss over the validation rows as `eval_loss`."""
        model: Any = self.model
        size, count, index = self.args.per_device_train_batch_size, self.accelerator.num_processes, self.accelerator.process_index
        starts = range(0, len(self.held_out), size)
        total = 0.0
        model.eval()
        with torch.no_grad():
            for start in starts if self.sharded else starts[index::count]:
                some = self.held_out[start : start + size]
                total += float(self.loss(model, self._prepare_inputs(collate_rows(some)))) * len(some)  # type: ignore[arg-type]
        model.train()
        if count > 1 and not self.sharded:
            summed: Any = self.accelerator.reduce(torch.tensor(total, dtype=torch.float64, device=self.args.device), reduction="sum")
            total = float(summed)
        return {"eval_loss": total / len(self.held_out)}


class _Rows(Dataset):
    """Rows by their number, and whether they count: see `processes.SharedBatches`."""

    def __init__(self, rows: Sequence[LossRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[LossRow, bool]:
        return self.rows[index if index >= 0 else -1 - index], index >= 0


def _collate(items: Sequence[tuple[LossRow, bool]]) -> dict[str, Any]:
    """Return what a loss is given, and how many of its rows count."""
    return {**collate_rows([row for row, _ in items]), "counted": sum(counts for _, counts in items)}


def collate_rows(rows: Sequence[LossRow]) -> LossBatch:
    """Pad rows on the right into what a loss is given."""
    longest = max(len(sequence.ids) for sequence, _ in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), NOT_COUNTED, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (sequence, _) in enumerate(rows):
        n = len(sequence.ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(sequence.ids), torch.tensor(sequence.labels), 1
    prompts = torch.tensor([sequence.prompt_tokens for sequence, _ in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompt_tokens": prompts, "rows": [dict(row) for _, row in rows]}

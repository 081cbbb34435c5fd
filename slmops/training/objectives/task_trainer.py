"""How is validation measured where there are several tasks? Each by itself; their plain mean chooses the best adapter.

A mean over all tokens would be that of the task with the longest answers.
"""

from __future__ import annotations

from collections.abc import Mapping

from slmops.data import Corpus
from slmops.training.objectives.material import Setup
from slmops.training.trainer import SupervisedTrainer, step_of


class TaskTrainer(SupervisedTrainer):
    """A `SupervisedTrainer` whose validation is by task.

    Args:
        setup: of the run; its course has the order.
        held_out: validation rows by the task's name.
        seed: of the order of batches.
    """

    def __init__(self, setup: Setup, held_out: Mapping[str, Corpus], seed: int) -> None:
        rows = rows_of(setup.train)
        super().__init__(
            setup.model,
            setup.arguments,
            rows,
            rows_of(setup.validation),
            seed,
            step_of(setup.model, rows, setup.arguments.device, int8=setup.int8),
            setup.keep,
            order=setup.course.order,
        )
        self.held_out = {name: rows_of(corpus) for name, corpus in held_out.items()}

    def measure(self) -> dict[str, float]:
        """Return each task's loss as `eval_loss_NAME`, in nats a supervised token, and their mean as `eval_loss`."""
        losses = {f"eval_loss_{name}": self.shared_validation_loss(rows) for name, rows in self.held_out.items()}
        return {"eval_loss": sum(losses.values()) / len(losses), **losses}


def rows_of(corpus: Corpus) -> list[tuple[list[int], list[int]]]:
    """Return the (ids, labels) of each sequence."""
    return [(list(sequence.ids), list(sequence.labels)) for sequence in corpus.sequences]

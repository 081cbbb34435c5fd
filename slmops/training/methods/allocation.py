"""When does AdaLoRA move its ranks? After each step of the optimizer, before gradients are cleared.

PEFT does the rest (Zhang et al. 2023, arXiv 2303.10512): ranks begin at `init_r` in every matrix, are all kept for the first
tenth of the steps, then fall along a cubic curve to `target_r` in the mean, and stay for the last fifth. A rank that is cut is
cut after each step (deltaT 1), so that what is saved in the middle of a run is what was validated.

Its regularizer keeps P and Q near orthogonal. PEFT adds it to a loss that the model computes from labels; ours is computed from
logits, so its gradient is added here, by PEFT's formula and weight: 0.5 times the mean over all P and Q of ||P P' - I||.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slmops.errors import InvalidInput

_FIRST, _LAST = 0.1, 0.2
"""Shares of the steps before ranks fall, and after."""
_LEAST = 2  # steps in which they do: the first measures what the second cuts


class RankAllocation(TrainerCallback):
    """Sets AdaLoRA's schedule, adds its regularizer's gradient, and moves its ranks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.peft_config["default"]
        self.left = [value for name, value in model.named_parameters() if ".lora_A." in name]
        self.right = [value for name, value in model.named_parameters() if ".lora_B." in name]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fit the schedule to the run's steps."""
        steps = state.max_steps
        self.config.total_step = steps
        if steps < _LEAST:
            raise InvalidInput(f"adalora moves its ranks between steps, and this run has {steps}", "give more rows or more epochs")
        self.config.tinit = min(round(_FIRST * steps), steps - _LEAST)
        self.config.tfinal = min(round(_LAST * steps), steps - self.config.tinit - _LEAST)
        self.model.base_model.rankallocator.set_total_step(steps)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the regularizer's gradient to the loss's."""
        penalty([*self.left, *(matrix.T for matrix in self.right)], self.config.orth_reg_weight).backward()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update what is known of the importance of each rank, and cut the least important ones."""
        self.model.base_model.update_and_allocate(state.global_step + 1)


def penalty(matrices: list[torch.Tensor], weight: float) -> torch.Tensor:
    """Return how far matrices, (rank, width) each, are from orthonormal rows: weight * mean of ||P P' - I|| (Frobenius)."""
    squares = [matrix @ matrix.T for matrix in matrices]
    distances = [torch.linalg.matrix_norm(square - torch.eye(len(square), device=square.device)) for square in squares]
    return weight * torch.stack(distances).mean()

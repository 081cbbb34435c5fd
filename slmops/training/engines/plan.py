"""What is settled before a run of our own trainer begins: its precision, the Trainer's arguments, what it will take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import environment, progress
from slmops.config import FinetuneSettings
from slmops.data import Corpus
from slmops.runtime.quantized_base import QuantizedBase
from slmops.training import checkpoints, methods, processes
from slmops.training.engines.outcome import total_steps
from slmops.training.objectives.material import Course
from slmops.training.precision import choose_precision
from slmops.training.processes import Team

if TYPE_CHECKING:
    from slmops.training.estimating import Estimate


def precision_of(settings: FinetuneSettings, package: QuantizedBase | None) -> str:
    """Return the precision of the frozen weights' products, "fp32", "bf16" or "int8"."""
    trains_base = methods.method_of(settings.method).trains_base
    return choose_precision(settings.run.precision, settings.method.method, exact_base=package is not None, trains_base=trains_base)


def foretell(
    base: Path, train: Corpus, validation: Corpus, settings: FinetuneSettings, package: QuantizedBase | None, course: Course, team: Team
) -> Estimate | None:
    """Say how much memory and time the run will take; None where another trainer than ours runs."""
    from slmops.training.estimating import affordable

    if course.trainer is not None or course.model is not None or not train.sequences:
        return None
    steps = total_steps(settings, course.rows_per_epoch(train))
    precision = precision_of(settings, package)
    found = affordable(base, train, len(validation.sequences), settings, precision, steps, team.size)
    if team.leads:
        how = f"{precision}, activations computed twice to save memory" if found.recomputes else precision
        progress.say(f"will take about {found.memory_bytes / 1e9:.2f} GB of memory and {_duration(found.seconds)} ({how})")
    return found


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def training_arguments(
    settings: FinetuneSettings, folder: Path, rows: int, parameters: int, validates: bool, team: Team = processes.ALONE
) -> tuple[Any, int]:
    """Return the Trainer's arguments and the number of optimizer steps."""
    from transformers import TrainingArguments

    optimizer, run = settings.optimizer, settings.run
    steps = total_steps(settings, rows)
    every, saved = math.ceil(steps / run.evaluations), checkpoints.interval(run, steps)
    arguments = TrainingArguments(
        output_dir=str(folder / checkpoints.FOLDER),
        max_steps=steps,
        per_device_train_batch_size=optimizer.batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation,
        learning_rate=optimizer.learning_rate or methods.default_learning_rate(parameters, settings.method.method),
        lr_scheduler_type=optimizer.schedule if optimizer.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(optimizer.warmup_share * steps),
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_gradient_norm,
        seed=run.seed,
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        save_strategy="steps" if saved else "no",
        save_steps=saved or steps,
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        # Without it, processes on a machine without a GPU would not find each other, and each train an adapter alone.
        use_cpu=team.size > 1 and not environment.require("torch", "to train").cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    return arguments, steps
